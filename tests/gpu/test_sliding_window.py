"""Layers with a window in a pool of their own, on an NVIDIA GPU: the answers of the CPU in float32.

`ModelRig` makes blocks NaN as soon as no token to come sees them, and their table entries null: kernels must need
neither.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_rig import greedy
from oracle import make_prompt
from sliding_checkpoint import WINDOW, make_sliding_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

PROMPTS = [make_prompt(384, length, 0) for length in (1, 15, 16, 17, WINDOW, 101)]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sliding_checkpoint(tmp_path_factory.mktemp("models") / "gemma")


@pytest.mark.parametrize("chunk_tokens", [10_000, 24, 7])
def test_float32_answers_are_those_of_the_cpu(model_dir: Path, chunk_tokens: int) -> None:
    expected = greedy(model_dir, PROMPTS, NUM_TOKENS)
    assert greedy(model_dir, PROMPTS, NUM_TOKENS, chunk_tokens, device="cuda") == expected
