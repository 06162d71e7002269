"""M-RoPE positions against `transformers`' own, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.mrope import MropePositions, mrope_positions
from kvrelay_core.request import MediaReference

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Item:
    offset: int
    num_tokens: int
    grid: Grid


def lay_out(parts: list[int | Grid]) -> tuple[int, list[Item]]:
    """Text of so many tokens, or an image of such a grid, one after another."""
    num_tokens, items = 0, []
    for part in parts:
        if isinstance(part, int):
            num_tokens += part
            continue
        items.append(Item(num_tokens, part[0] * part[1] * part[2] // 4, part))
        num_tokens += items[-1].num_tokens
    return num_tokens, items


@cache
def reference_model() -> Any:
    """Only its configuration is used."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig()
    return model


def reference_positions(num_tokens: int, items: list[Item]) -> tuple[list[list[int]], int]:
    types = torch.zeros(1, num_tokens, dtype=torch.int32)
    for item in items:
        types[0, item.offset : item.offset + item.num_tokens] = 1
    grids = torch.tensor([item.grid for item in items]) if items else None
    positions, delta = reference_model().get_rope_index(torch.zeros(1, num_tokens, dtype=torch.int64), types, grids)
    return positions[:, 0].tolist(), int(delta)


@pytest.mark.parametrize(
    "parts",
    [
        [7],
        [3, (1, 4, 6), 5],
        [(1, 4, 6), 5],
        [3, (1, 6, 4)],
        [(1, 2, 2)],
        [2, (1, 2, 20), 1, (1, 30, 2), 4, (1, 8, 8), 2],
        [1, (2, 4, 4), 9],
        [1, (5, 2, 2)],
    ],
)
def test_positions_are_those_of_transformers(parts: list[int | Grid]) -> None:
    num_tokens, items = lay_out(parts)
    components, delta = mrope_positions(num_tokens, items)
    assert (list(components), delta) == reference_positions(num_tokens, items)


def test_touching_images_are_two() -> None:
    num_tokens, items = lay_out([1, (1, 2, 4), (1, 4, 2), 1])
    components, delta = mrope_positions(num_tokens, items)
    assert components == ([0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5])
    assert delta == 0


def test_media_references_of_a_request_fit() -> None:
    references = [MediaReference(b"hash", 1, 2, (1, 2, 4)), MediaReference(b"other", 3, 2, (1, 4, 2))]
    num_tokens, items = lay_out([1, (1, 2, 4), (1, 4, 2), 1])
    assert mrope_positions(num_tokens, references) == mrope_positions(num_tokens, items)


def test_the_merge_size_is_the_configurations() -> None:
    components, delta = mrope_positions(4, [Item(0, 4, (1, 2, 2))], merge_size=1)
    assert components == ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1])
    assert delta == -2


@pytest.mark.parametrize("cut", [(0, 11), (0, 3), (2, 7), (5, 11), (9, 14), (11, 12), (20, 23), (4, 4)])
def test_a_stretch_of_a_sequence(cut: tuple[int, int]) -> None:
    num_tokens, items = lay_out([3, (1, 4, 6), 2])
    positions = MropePositions.of(num_tokens, items, 2)
    assert (num_tokens, positions.delta) == (11, -3)
    start, end = cut
    for component, whole in zip(positions.between(start, end), positions.prompt, strict=True):
        assert component == [whole[index] if index < 11 else index - 3 for index in range(start, end)]


def test_an_empty_prompt_has_no_positions() -> None:
    assert mrope_positions(0, []) == (([], [], []), 0)


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([Item(-1, 1, (1, 2, 2))], "leave the prompt"),
        ([Item(9, 2, (1, 2, 4))], "leave the prompt"),
        ([Item(0, 2, (1, 2, 4)), Item(1, 2, (1, 2, 4))], "overlap"),
        ([Item(4, 1, (1, 2, 2)), Item(0, 1, (1, 2, 2))], "order of the prompt"),
        ([Item(0, 0, (1, 2, 2))], "overlap others or leave"),
        ([Item(0, 2, (1, 2, 2))], "makes 1 tokens, the prompt holds 2"),
        ([Item(0, 1, (1, 3, 2))], "not of whole 2-blocks"),
        ([Item(0, 1, (0, 0, 0))], "not of whole 2-blocks"),
    ],
)
def test_media_that_do_not_fit_are_refused(items: list[Item], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        mrope_positions(10, items)
