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


@pytest.mark.parametrize("ids", [[0, 0, 0], [0, 0, 1, 1], [3, 4, 4, 4, 7, 7, 7]])
def test_rows_that_lie_in_order_need_none(ids: list[int]) -> None:
    assert Segments.of(torch.tensor(ids)).order_N is None


def test_each_row_becomes_several() -> None:
    ids = torch.tensor([2, 0, 2, 1])
    larger, expected = Segments.of(ids).of_larger_rows(3), Segments.of(ids.repeat_interleave(3))
    assert larger.groups == expected.groups
    assert larger.order_N is not None and expected.order_N is not None
    assert torch.equal(larger.order_N, expected.order_N)
    in_order = Segments.of(torch.tensor([0, 0, 1, 1])).of_larger_rows(2)
    assert (in_order.groups, in_order.order_N) == (((2, 4),), None)
