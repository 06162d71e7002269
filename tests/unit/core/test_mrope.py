"""M-RoPE positions of images and videos against `transformers`' own, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rope_reference import rope_index

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.mrope import MropePositions, mrope_delta, mrope_positions
from kvrelay_core.request import MediaReference

Grid = tuple[int, int, int]
Video = tuple[int, int, int, float]  # a grid, and seconds between two steps of it in time


@dataclass(frozen=True)
class Scale:
    merge_size: int = 2
    tokens_per_second: float = 4


@dataclass(frozen=True)
class Item:
    offset: int
    num_tokens: int
    grid: Grid
    seconds_per_grid: float = 0.0


def lay_out(parts: Sequence[int | Grid | Video]) -> tuple[int, list[Item]]:
    """Text of so many tokens, an image of such a grid, or a video, one after another."""
    num_tokens, items = 0, []
    for part in parts:
        if isinstance(part, int):
            num_tokens += part
            continue
        items.append(Item(num_tokens, math.prod(part[:3]) // 4, part[:3], *part[3:]))
        num_tokens += items[-1].num_tokens
    return num_tokens, items


@cache
def reference_model(tokens_per_second: int) -> Any:
    """Only its configuration is used."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second})
    return model


def reference_positions(
    num_tokens: int, items: list[Item], tokens_per_second: int = 4, *, counts_time: bool = False
) -> tuple[list[list[int]], int]:
    """Those of `transformers`, where `counts_time` with text put behind the time of videos."""
    types = torch.zeros(1, num_tokens, dtype=torch.int32)
    for item in items:
        types[0, item.offset : item.offset + item.num_tokens] = 2 if item.seconds_per_grid else 1
    images = [item.grid for item in items if not item.seconds_per_grid]
    videos = [item.grid for item in items if item.seconds_per_grid]
    get_rope_index = reference_model(tokens_per_second).get_rope_index
    positions, delta = (partial(rope_index, get_rope_index) if counts_time else get_rope_index)(
        torch.zeros(1, num_tokens, dtype=torch.int64),
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        # As the processor hands them over.
        second_per_grid_ts=torch.tensor([item.seconds_per_grid for item in items if item.seconds_per_grid]),
    )
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
    components, delta = mrope_positions(num_tokens, items, Scale())
    assert (list(components), delta) == reference_positions(num_tokens, items)
    assert mrope_delta(items, Scale()) == delta


@pytest.mark.parametrize(
    "parts",
    [
        [3, (3, 4, 6, 1.0), 5],
        [(3, 4, 6, 0.5), 5],
        [3, (4, 6, 4, 1 / 3)],
        [2, (3, 2, 20, 2.0), 1, (1, 30, 2), 4, (2, 8, 8, 0.25), 2],
        [2, (1, 4, 4), 1, (5, 4, 4, 0.08), 3],
        [1, (1, 2, 2, 1.0), 9],
        [1, (40, 2, 2, 2.0), 3],
    ],
)
@pytest.mark.parametrize("tokens_per_second", [2, 4, 25])
def test_positions_of_videos_are_those_of_transformers_behind_their_time(
    parts: list[int | Grid | Video], tokens_per_second: int
) -> None:
    num_tokens, items = lay_out(parts)
    scale = Scale(tokens_per_second=tokens_per_second)
    components, delta = mrope_positions(num_tokens, items, scale)
    assert (list(components), delta) == reference_positions(num_tokens, items, tokens_per_second, counts_time=True)
    assert mrope_delta(items, scale) == delta


@pytest.mark.parametrize(
    "parts", [[3, (3, 4, 12, 0.5), 5], [(2, 6, 4, 0.5), 5, (4, 20, 4, 1 / 3), 1, (1, 8, 4), 3], [2, (9, 8, 8, 0.1)]]
)
def test_where_their_time_is_short_they_are_its_own(parts: list[int | Grid | Video]) -> None:
    num_tokens, items = lay_out(parts)
    components, delta = mrope_positions(num_tokens, items, Scale())
    assert (list(components), delta) == reference_positions(num_tokens, items)


def test_text_goes_on_behind_a_videos_time_where_that_of_transformers_does_not() -> None:
    """When this fails because `transformers` has changed, docs/adr/0021 and `rope_reference` can go."""
    num_tokens, items = lay_out([1, (3, 2, 4, 1.0), 2])
    components, delta = mrope_positions(num_tokens, items, Scale())
    theirs, their_delta = reference_positions(num_tokens, items)
    assert [component[:7] for component in components] == [component[:7] for component in theirs]
    assert [component[7:] for component in components] == [[10, 11]] * 3
    assert [component[7:] for component in theirs] == [[3, 4]] * 3
    assert (delta, their_delta) == (3, 1)  # an answer goes on from 12 here, from 10 there


@given(st.floats(0.002, 2000), st.sampled_from([2, 4, 25]), st.integers(1, 40))
@example(2 / 0.7, 25, 40)
def test_time_is_rounded_as_transformers_rounds_it(seconds: float, tokens_per_second: int, steps: int) -> None:
    num_tokens, items = lay_out([1, (steps, 2, 2, seconds)])
    components, delta = mrope_positions(num_tokens, items, Scale(tokens_per_second=tokens_per_second))
    assert (list(components), delta) == reference_positions(num_tokens, items, tokens_per_second)


def test_a_videos_time_counts_from_where_it_begins() -> None:
    num_tokens, items = lay_out([2, (3, 2, 4, 1.5), 2])
    components, delta = mrope_positions(num_tokens, items, Scale(tokens_per_second=2))
    times = [0, 1, 2, 2, 5, 5, 8, 8, 9, 10]
    assert components == (times, [0, 1, *[2] * 6, 9, 10], [0, 1, *[2, 3] * 3, 9, 10])
    assert delta == 1
    assert mrope_positions(num_tokens, [replace(items[0], seconds_per_grid=0.0)], Scale()) != (components, delta)


def test_touching_images_are_two() -> None:
    num_tokens, items = lay_out([1, (1, 2, 4), (1, 4, 2), 1])
    components, delta = mrope_positions(num_tokens, items, Scale())
    assert components == ([0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5])
    assert delta == 0


def test_media_references_of_a_request_fit() -> None:
    references = [MediaReference(b"hash", 1, 2, (1, 2, 4)), MediaReference(b"other", 3, 2, (1, 4, 2))]
    num_tokens, items = lay_out([1, (1, 2, 4), (1, 4, 2), 1])
    assert mrope_positions(num_tokens, references, Scale()) == mrope_positions(num_tokens, items, Scale())


def test_the_merge_size_is_the_configurations() -> None:
    components, delta = mrope_positions(4, [Item(0, 4, (1, 2, 2))], Scale(merge_size=1))
    assert components == ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1])
    assert delta == -2


@pytest.mark.parametrize("cut", [(0, 11), (0, 3), (2, 7), (5, 11), (9, 14), (11, 12), (20, 23), (4, 4)])
def test_a_stretch_of_a_sequence(cut: tuple[int, int]) -> None:
    num_tokens, items = lay_out([3, (1, 4, 6), 2])
    positions = MropePositions.of(num_tokens, items, Scale())
    assert (num_tokens, positions.delta) == (11, -3)
    start, end = cut
    for component, whole in zip(positions.between(start, end), positions.prompt, strict=True):
        assert component == [whole[index] if index < 11 else index - 3 for index in range(start, end)]


def test_an_empty_prompt_has_no_positions() -> None:
    assert mrope_positions(0, [], Scale()) == (([], [], []), 0)


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
        mrope_positions(10, items, Scale())
