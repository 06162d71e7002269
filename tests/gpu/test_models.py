"""Every architecture on an NVIDIA GPU: the answers of the CPU in float32, logits close to them in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, make_variant
from model_rig import ModelRig, greedy
from oracle import make_prompt

from kvrelay_engine.loader import load_model
from kvrelay_engine.runner import BatchRow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

PROMPTS = [make_prompt(384, length, 0) for length in (1, 15, 16, 17, 101)]
NUM_TOKENS = 32


@pytest.fixture(scope="module", params=VARIANTS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("models"), request.param)


@pytest.mark.parametrize("chunk_tokens", [10_000, 7])
def test_float32_answers_are_those_of_the_cpu(model_dir: Path, chunk_tokens: int) -> None:
    expected = greedy(model_dir, PROMPTS, NUM_TOKENS)
    assert greedy(model_dir, PROMPTS, NUM_TOKENS, chunk_tokens, device="cuda") == expected


def test_bfloat16_logits_are_close(model_dir: Path) -> None:
    logits = []
    for dtype, device in (("float32", "cpu"), ("bfloat16", "cuda")):
        rig = ModelRig(load_model(str(model_dir), dtype, device))
        sequences = [rig.add(prompt, 0) for prompt in PROMPTS]
        rows = [BatchRow(sequence.tokens, 0, sequence.block_table, True) for sequence in sequences]
        logits.append(rig.runner.run(rows).cpu())
    expected, actual = logits
    assert ((actual - expected).norm() / expected.norm()).item() < 0.1
