"""`transformers`' positions of Qwen2.5-VL's tokens, with what comes behind a video put behind its time, too.

Since 5.3 `transformers` counts on from the longer side of a video's frames alone, see docs/adr/0021. Where the time of
no video reaches beyond it these are its own positions, untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch

VIDEO_TYPE = 2  # of `mm_token_type_ids`


def count_time(model: Any) -> None:
    """Has the model use these positions."""
    model.get_rope_index = partial(rope_index, model.get_rope_index)


def rope_index(
    get_rope_index: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    input_ids: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    **inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the model's own, for one prompt: positions [3, 1, n], and what a later token adds to its index."""
    positions, _ = get_rope_index(input_ids, mm_token_type_ids=mm_token_type_ids, **inputs)
    at = 0
    for kind, group in groupby(mm_token_type_ids[0].tolist()):
        end = at + len(list(group))
        if kind == VIDEO_TYPE:
            highest = positions[:, 0, at:end].amax(dim=1)
            positions[:, :, end:] += max(0, int(highest[0] - highest[1:].max()))
        at = end
    return positions, positions.amax().reshape(1, 1) + 1 - input_ids.shape[1]
