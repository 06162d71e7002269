"""Greedy answers are those of `transformers`, token by token, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, make_variant
from model_rig import BLOCK_TOKENS, ModelRig, greedy
from oracle import decisive_prompts

from kvrelay_engine.loader import load_model

NUM_TOKENS = 64
VOCAB_SIZE = 384
# One token, one off a block on either side, a whole one, several and a part.
PROMPT_LENGTHS = (1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 4 * BLOCK_TOKENS, 6 * BLOCK_TOKENS + 5)
MIN_MARGIN = 1e-4  # between the best two logits of every token: far above what rounding does

Case = tuple[Path, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, prompts and the expected answers."""
    torch.set_num_threads(1)
    model_dir = make_variant(tmp_path_factory.mktemp("oracle"), request.param)
    found = decisive_prompts(model_dir, PROMPT_LENGTHS, NUM_TOKENS, MIN_MARGIN, VOCAB_SIZE)
    return model_dir, [prompt for prompt, _ in found], [answer for _, answer in found]


def test_each_prompt_alone(case: Case) -> None:
    model_dir, prompts, answers = case
    rig = ModelRig(load_model(str(model_dir), "float32", "cpu"))
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = rig.add(prompt, NUM_TOKENS)
        rig.generate([sequence], NUM_TOKENS)
        assert sequence.generated == answer, f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("chunk_tokens", [BLOCK_TOKENS, 7])
def test_mixed_batch(case: Case, chunk_tokens: int) -> None:
    """With small chunks, short prompts decode in the same steps in which long ones are still computed."""
    model_dir, prompts, answers = case
    assert greedy(model_dir, prompts, NUM_TOKENS, chunk_tokens) == answers


def test_batch_of_sixteen(case: Case) -> None:
    """More sequences of very different lengths than one attention group takes."""
    model_dir, prompts, answers = case
    picks = [index % len(prompts) for index in range(16)]
    rig = ModelRig(load_model(str(model_dir), "float32", "cpu"), num_blocks=200)
    sequences = [rig.add(prompts[pick], NUM_TOKENS) for pick in picks]
    rig.generate(sequences, NUM_TOKENS, 40)
    assert [sequence.generated for sequence in sequences] == [answers[pick] for pick in picks]


def test_reused_prefix_blocks(case: Case) -> None:
    """A second sequence computes only what follows the full blocks that it shares with the first."""
    model_dir, prompts, answers = case
    rig = ModelRig(load_model(str(model_dir), "float32", "cpu"))
    first, second = rig.add(prompts[-1], NUM_TOKENS), rig.add(prompts[-1], NUM_TOKENS)
    rig.generate([first], NUM_TOKENS)
    num_shared = (len(prompts[-1]) - 1) // BLOCK_TOKENS
    second.block_table[:num_shared] = first.block_table[:num_shared]
    second.num_computed = num_shared * BLOCK_TOKENS
    rig.generate([second], NUM_TOKENS)
    assert second.generated == answers[-1]


def test_the_answers_are_not_loops(case: Case) -> None:
    """An oracle that repeats a token says little about the KV cache."""
    _, _, answers = case
    assert all(len(set(answer)) >= 16 for answer in answers)
