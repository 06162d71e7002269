"""The runner's contract: which logits it returns, in which order, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import make_variant, reference_logits
from model_rig import BLOCK_TOKENS, ModelRig
from oracle import make_prompt

from kvrelay_core.errors import ConfigError
from kvrelay_engine.loader import load_model
from kvrelay_engine.model_runner import ModelRunner
from kvrelay_engine.runner import BatchRow

VOCAB_SIZE = 384
TOKENS = make_prompt(VOCAB_SIZE, 40, 0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_variant(tmp_path_factory.mktemp("runner"), "llama3_scaled")


def make_rig(model_dir: Path, dtype: str = "float32") -> ModelRig:
    return ModelRig(load_model(str(model_dir), dtype, "cpu"), num_blocks=32)


def test_logits_are_those_of_the_reference_at_every_position(model_dir: Path) -> None:
    rig = make_rig(model_dir)
    table = rig.add(TOKENS, 0).block_table
    rows = [rig.runner.run([BatchRow([token], start, table, True)]) for start, token in enumerate(TOKENS)]
    torch.testing.assert_close(torch.cat(rows), reference_logits(model_dir, TOKENS), rtol=1e-4, atol=1e-4)


def test_returns_only_the_wanted_rows_in_order(model_dir: Path) -> None:
    rig = make_rig(model_dir)
    sequences = [rig.add(TOKENS[:length], 0) for length in (5, 17, 1, 30)]
    wanted = (True, False, True, True)
    rows = [
        BatchRow(sequence.tokens, 0, sequence.block_table, wants)
        for sequence, wants in zip(sequences, wanted, strict=True)
    ]
    logits = rig.runner.run(rows)
    expected = reference_logits(model_dir, TOKENS)[[4, 0, 29]]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_no_row_wants_logits(model_dir: Path) -> None:
    rig = make_rig(model_dir)
    logits = rig.runner.run([BatchRow(TOKENS[:9], 0, rig.add(TOKENS, 0).block_table, False)])
    assert logits.shape == (0, VOCAB_SIZE)
    assert rig.runner.vocab_size == VOCAB_SIZE


def test_writes_its_slots_and_no_other(model_dir: Path) -> None:
    rig = make_rig(model_dir)
    table = rig.add(TOKENS, 0).block_table
    rig.runner.run([BatchRow(TOKENS[:10], 0, table, False)])
    before = rig.pool.clone()
    rig.runner.run([BatchRow(TOKENS[10:20], 10, table, True)])
    changed = (rig.pool.nan_to_num(0.0) != before.nan_to_num(0.0)).permute(0, 4, 1, 2, 3, 5).flatten(2).any(-1)
    slots = {(block, offset) for block, offset in changed.nonzero().tolist()}
    assert slots == {(table[position // BLOCK_TOKENS], position % BLOCK_TOKENS) for position in range(10, 20)}


def test_block_tables_may_be_longer_than_the_context(model_dir: Path) -> None:
    """A sequence may hold blocks that it has not come to yet."""
    rig = make_rig(model_dir)
    short, long = rig.add(TOKENS, 0), rig.add(TOKENS, 10 * BLOCK_TOKENS)
    logits = rig.runner.run([BatchRow(TOKENS, 0, sequence.block_table, True) for sequence in (short, long)])
    assert torch.equal(logits[0], logits[1])


def test_copied_blocks_serve_like_their_source(model_dir: Path) -> None:
    rig = make_rig(model_dir)
    source, copy = rig.add(TOKENS, 1), rig.add(TOKENS, 1)
    rig.runner.run([BatchRow(TOKENS, 0, source.block_table, False)])
    rig.runner.copy_blocks(list(zip(source.block_table, copy.block_table, strict=True)))
    rig.runner.copy_blocks([])
    last = [BatchRow([7], len(TOKENS), sequence.block_table, True) for sequence in (source, copy)]
    logits = rig.runner.run(last)
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[0], reference_logits(model_dir, [*TOKENS, 7])[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_is_close(model_dir: Path, dtype: str, tolerance: float) -> None:
    rig = make_rig(model_dir, dtype)
    table = rig.add(TOKENS, 0).block_table
    rig.runner.run([BatchRow(TOKENS[:-1], 0, table, False)])
    logits = rig.runner.run([BatchRow(TOKENS[-1:], len(TOKENS) - 1, table, True)])[0]
    expected = reference_logits(model_dir, TOKENS)[-1]
    assert logits.dtype == torch.float32
    assert rig.pool.dtype == getattr(torch, dtype)
    assert ((logits - expected).norm() / expected.norm()).item() < tolerance


def test_a_pool_of_another_layout_is_refused(model_dir: Path) -> None:
    loaded = load_model(str(model_dir), "float32", "cpu")
    (layout,) = load_model(str(model_dir), "bfloat16", "cpu").kv_layouts(BLOCK_TOKENS, 64)
    with pytest.raises(ConfigError, match="do not fit the model"):
        ModelRunner(loaded, [torch.empty(2, *layout.shape, dtype=torch.bfloat16)], [layout])
