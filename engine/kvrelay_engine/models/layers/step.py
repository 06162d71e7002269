"""What the layers need to know of one step's batch, as tensors on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvrelay_engine.runner import MediaRows
from kvrelay_kernels.attention import AttentionBatch


@dataclass(frozen=True, slots=True)
class LogitsRows:
    """Some tokens of the batch, each the last one of its sequence, so that it sees the whole context."""

    rows_R: Tensor  # int64, ascending
    attention: AttentionBatch  # of these tokens alone


@dataclass(frozen=True, slots=True)
class ModelStep:
    """Token i of the batch is `token_ids_N[i]` at `positions_N[i]`; its KV goes to `slots_N[i]`. All int64.

    Positions are those of RoPE. Where M-RoPE gives some token three that differ, `positions_3N` has all of them, by
    time, height and width. Where local layers have a pool of their own, `local` is the same step in that pool's blocks.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    slots_N: Tensor  # block * block_tokens + offset
    attention: AttentionBatch
    logits: LogitsRows | None  # the tokens whose logits are wanted; None: all
    positions_3N: Tensor | None = None
    media: Sequence[MediaRows] = ()  # `first` counts the tokens of the batch
    local: ModelStep | None = None
