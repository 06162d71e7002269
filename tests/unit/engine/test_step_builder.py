"""What a step's tensors hold where rows bring positions and media of their own."""

from __future__ import annotations

import pytest
import torch

from kvrelay_engine.models.layers.media import place_media
from kvrelay_engine.models.layers.rope import Rope, rope_table
from kvrelay_engine.rope_config import MropeConfig, RopeConfig
from kvrelay_engine.runner import BatchRow, MediaRows
from kvrelay_engine.step_builder import StepBuilder

CPU = torch.device("cpu")
BUILDER = StepBuilder(4, CPU)


def test_plain_rows_have_no_components_and_no_media() -> None:
    step = BUILDER.build([BatchRow([5, 6, 7], 2, [3, 1], True), BatchRow([8], 9, [2, 4, 6], True)])
    assert step.positions_N.tolist() == [2, 3, 4, 9]
    assert step.slots_N.tolist() == [14, 15, 4, 25]
    assert step.positions_3N is None
    assert not step.media


def test_positions_that_are_one_are_shifted_and_slots_are_not() -> None:
    """A sequence that decodes behind an image."""
    chunk = BatchRow([5, 6, 7], 2, [3, 1], False, positions=([0, 1, 2], [0, 1, 2], [0, 1, 2]))
    token = BatchRow([8], 9, [2, 4, 6], True, positions=([4], [4], [4]))
    step = BUILDER.build([chunk, token])
    assert step.positions_N.tolist() == [0, 1, 2, 4]
    assert step.slots_N.tolist() == [14, 15, 4, 25]
    assert step.positions_3N is None


def test_three_positions_beside_rows_that_have_one() -> None:
    image = BatchRow([5, 6], 2, [3], False, positions=([2, 2], [2, 2], [2, 3]))
    step = BUILDER.build([BatchRow([1, 1], 6, [1, 2], True), image, BatchRow([8], 9, [2, 4, 6], True)])
    assert step.positions_3N is not None
    assert step.positions_3N.tolist() == [[6, 7, 2, 2, 9], [6, 7, 2, 2, 9], [6, 7, 2, 3, 9]]


def test_media_are_counted_from_the_first_token_of_the_batch() -> None:
    rows = torch.randn(2, 8)
    step = BUILDER.build([BatchRow([1, 1], 0, [1], True), BatchRow([5, 6, 7], 0, [2], True, [MediaRows(1, rows)])])
    [item] = step.media
    assert item.first == 3
    assert item.rows is rows


@pytest.mark.parametrize("first", [-1, 2])
def test_media_outside_their_row_are_a_bug(first: int) -> None:
    row = BatchRow([5, 6, 7], 0, [2], True, [MediaRows(first, torch.zeros(2, 8))])
    with pytest.raises(AssertionError, match="outside the tokens of their row"):
        BUILDER.build([row])


def test_media_take_the_places_of_their_tokens_in_the_models_dtype() -> None:
    embeddings_NE = torch.zeros(5, 4, dtype=torch.bfloat16)
    place_media([MediaRows(1, torch.ones(2, 4)), MediaRows(4, torch.full((1, 4), 2.0))], embeddings_NE)
    assert embeddings_NE[:, 0].tolist() == [0, 1, 1, 0, 2]
    with pytest.raises(RuntimeError):
        place_media([MediaRows(1, torch.ones(2, 3))], embeddings_NE)


def test_each_section_of_a_row_is_turned_by_its_own_component() -> None:
    table_PD = rope_table(RopeConfig(), 16, 50, CPU)
    rope = Rope(table_PD, MropeConfig((1, 3, 4), 2))
    image = BatchRow([5, 6], 2, [3], False, positions=([2, 2], [7, 8], [30, 31]))
    rows = rope.rows(BUILDER.build([image]))
    assert rows.rows_N.tolist() == [0, 1]
    for token in range(2):
        row = rows.cos_sin_PD[token]
        for half in (0, 8):
            assert torch.equal(row[half : half + 1], table_PD[2, half : half + 1])
            assert torch.equal(row[half + 1 : half + 4], table_PD[7 + token, half + 1 : half + 4])
            assert torch.equal(row[half + 4 : half + 8], table_PD[30 + token, half + 4 : half + 8])


def test_one_position_a_token_reads_the_table_itself() -> None:
    table_PD = rope_table(RopeConfig(), 16, 50, CPU)
    step = BUILDER.build([BatchRow([5, 6], 2, [3], False)])
    for rope in (Rope(table_PD), Rope(table_PD, MropeConfig((1, 3, 4), 2))):
        rows = rope.rows(step)
        assert rows.cos_sin_PD is table_PD
        assert rows.rows_N is step.positions_N


def test_a_model_without_mrope_takes_no_three_positions() -> None:
    image = BatchRow([5, 6], 2, [3], False, positions=([2, 2], [7, 8], [30, 31]))
    with pytest.raises(AssertionError, match="one position each"):
        Rope(rope_table(RopeConfig(), 16, 50, CPU)).rows(BUILDER.build([image]))


def test_tokens_that_want_logits_attend_alone_to_their_whole_context() -> None:
    chunk, prompt = BatchRow([5, 6, 7], 2, [3, 1], False), BatchRow([1, 2], 0, [6], True)
    step = BUILDER.build([chunk, prompt, BatchRow([8], 9, [2, 4, 5], True)])
    assert step.logits is not None
    assert step.logits.rows_R.tolist() == [4, 5]
    attention = step.logits.attention
    assert (list(attention.query_starts), list(attention.context_lens)) == ([0, 1, 2], [2, 10])
    assert attention.block_tables_BM.tolist() == [[6, 0, 0], [2, 4, 5]]
    assert attention.max_query_len == 1


def test_decoding_alone_wants_the_logits_of_all() -> None:
    assert BUILDER.build([BatchRow([8], 9, [2, 4, 6], True), BatchRow([7], 3, [1], True)]).logits is None


def test_tokens_of_an_image_see_all_of_it_where_the_model_has_it_so() -> None:
    rows = [
        BatchRow([1, 1], 6, [1, 2], True),
        BatchRow([5, 6, 7, 8, 9], 3, [2, 3], True, [MediaRows(1, torch.zeros(2, 8)), MediaRows(3, torch.zeros(2, 8))]),
        BatchRow([8], 9, [2, 4, 6], True),
    ]
    builder = StepBuilder(4, CPU, media_see_ahead=True)
    attention = builder.build(rows).attention
    assert attention.last_visible == [6, 7, 3, 5, 5, 7, 7, 9]
    assert attention.last_visible_N is not None
    assert attention.last_visible_N.tolist() == attention.last_visible
    assert builder.build(rows[::2]).attention.last_visible is None
    assert BUILDER.build(rows).attention.last_visible is None
