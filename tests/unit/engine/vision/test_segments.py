"""Packed attention is that of each segment alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvrelay_engine.vision.segments import Segments


@pytest.mark.parametrize(
    ("ids", "groups"),
    [
        ([0, 0, 0], ((1, 3),)),
        ([0, 1, 2], ((3, 1),)),
        ([4, 4, 4, 0, 2, 2, 0, 4, 7], ((1, 1), (2, 2), (1, 4))),
        ([1, 0, 1, 0], ((2, 2),)),
    ],
)
def test_each_segment_attends_to_itself(ids: list[int], groups: tuple[tuple[int, int], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, len(ids), 2, 8, generator=generator)
    segments = Segments.of(torch.tensor(ids))
    assert segments.groups == groups
    found = segments.attend(q, k, v)
    for segment in set(ids):
        rows = torch.tensor([row for row, found_id in enumerate(ids) if found_id == segment])
        alone = F.scaled_dot_product_attention(*(x[rows].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        torch.testing.assert_close(found[rows], alone)


def test_one_segment_needs_no_order() -> None:
    assert Segments.of(torch.zeros(5, dtype=torch.int64)).order_N is None
