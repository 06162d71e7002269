"""Before the first request: every shape once, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from engine_rig import make_config
from made_checkpoints import CheckpointMaker
from model_rig import BLOCK_TOKENS, ModelRig
from vision_checkpoints import make_gemma3, make_qwen2_5_vl

from kvrelay_core.clock import ManualClock
from kvrelay_engine import messages
from kvrelay_engine.loader import load_model
from kvrelay_engine.media_startup import media_traits
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.runner import BatchRow
from kvrelay_engine.startup import build_engine
from kvrelay_engine.warm_up import NUM_DECODING, PROMPT_TOKENS, warm_up


@pytest.fixture
def rig(checkpoint: CheckpointMaker) -> ModelRig:
    return ModelRig(load_model(str(checkpoint("llama_plain")), "float32", "cpu"), num_blocks=8)


def warm(
    rig: ModelRig,
    max_tokens: int = 1000,
    max_num_seqs: int = 8,
    media: MediaTraits | None = None,
    rows: list[BatchRow] | None = None,
) -> list[list[int]]:
    """The tokens of each row of each step; the rows themselves are put into `rows`."""
    batches: list[list[int]] = []
    run = rig.runner.run

    class Watching:
        vocab_size = rig.runner.vocab_size

        def copy_blocks(self, pairs: Sequence[tuple[int, int]], group: int = 0) -> None:
            raise AssertionError("no block is copied")

        def run(self, batch: Sequence[BatchRow]) -> torch.Tensor:
            batches.append([len(row.token_ids) for row in batch])
            if rows is not None:
                rows.extend(batch)
            logits_RV = run(batch)
            assert not logits_RV.isnan().any()
            return logits_RV

    warm_up(
        Watching(),
        [rig.pool],
        block_tokens=BLOCK_TOKENS,
        max_tokens=max_tokens,
        max_num_seqs=max_num_seqs,
        synchronize=lambda: None,
        media=media,
    )
    return batches


def test_prompts_and_batches_of_decoding_are_run_once(rig: ModelRig) -> None:
    assert warm(rig) == [[PROMPT_TOKENS], [1], [1] * NUM_DECODING, [1, PROMPT_TOKENS]]


@pytest.mark.parametrize("make", [make_gemma3, make_qwen2_5_vl])
def test_a_prompt_with_an_image_is_run_once(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Its attention and its positions are other ones."""
    rig = ModelRig(load_model(str(make(tmp_path / "model")), "float32", "cpu"), num_blocks=8)
    traits = media_traits(rig.loaded.config)
    assert traits is not None
    rig.pool.fill_(3.5)
    rows: list[BatchRow] = []
    assert warm(rig, media=traits, rows=rows)[4:] == [[PROMPT_TOKENS]]
    [image] = rows[-1].media
    assert (image.first, tuple(image.rows.shape)) == (1, (PROMPT_TOKENS - 1, traits.hidden_size))
    assert not any(row.media for row in rows[:-1]) and (rows[-1].positions is None) == traits.whole_runs
    assert bool((rig.pool == 3.5).all())
    assert warm(rig, max_tokens=2, media=traits) == [[1], [1], [1] * NUM_DECODING, [1, 1]]


@pytest.mark.parametrize("max_tokens", [1, 2, BLOCK_TOKENS, BLOCK_TOKENS + 1])
def test_it_fits_into_a_small_engine(rig: ModelRig, max_tokens: int) -> None:
    batches = warm(rig, max_tokens, max_num_seqs=1)
    assert batches[0] == [max(1, max_tokens - 1)] and batches[2] == [1]


def test_no_block_is_changed(rig: ModelRig) -> None:
    rig.pool.fill_(3.5)
    warm(rig)
    assert bool((rig.pool == 3.5).all())


def test_the_engine_has_counted_and_measured_nothing(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    events: list[messages.Event] = []
    config = make_config(
        "prefill", model=str(checkpoint("llama_plain")), run_dir=str(tmp_path), kv_blocks=8,
        block_tokens=16, hash_unit_tokens=16, connectors=("shm",), dtype="float32", max_model_len=64,
    )  # fmt: skip
    with ExitStack() as stack:
        engine = build_engine(config, ManualClock(), events.append, stack).engine
        load = engine.load.report(0)
        assert (load.blocks_in_use, load.blocks_cached, load.steps, load.tokens_queued) == (0, 0, 0, 0)
        assert engine._throughput.seconds_for(1) == 0.0
        engine.load.check_integrity()
        assert events == []
        engine.close()
