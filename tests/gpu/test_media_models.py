"""Text sides given images, on an NVIDIA GPU: `transformers`' answers in float32, logits close to the CPU's in bfloat16.

M-RoPE, windows, and tokens of an image that see each other: prompts whole, in chunks, decoding, and all in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rig import ModelRig, PlacedImage
from vl_checkpoints import (
    GEMMA_IMAGE,
    GemmaReference,
    Layout,
    Question,
    QwenReference,
    decisive_question,
    make_gemma,
    make_qwen_vl,
)

from kvrelay_engine.loader import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

NUM_TOKENS = 16
MIN_MARGIN = 2e-4  # between the best two logits of every token: far above what rounding does
QWEN_LAYOUTS: list[Layout] = [
    [40],
    [21, (1, 8, 6), 17],
    [5, (1, 4, 4), 2, (1, 2, 8), 2, (1, 6, 4), 6],
    [3, (1, 2, 2), 15, (1, 12, 4), 1, (1, 8, 14), 4],
]
GEMMA_LAYOUTS: list[Layout] = [
    [60],
    [21, GEMMA_IMAGE, 17],
    [3, GEMMA_IMAGE, 2, GEMMA_IMAGE, 1, GEMMA_IMAGE, 6],
    [1, GEMMA_IMAGE, 70],
]
BFLOAT16_TOLERANCE = 0.1  # of the norm


@dataclass
class Case:
    model_dir: Path
    answers: list[tuple[Question, list[int], torch.Tensor]]

    def rig(self, dtype: str = "float32", device: str = "cuda") -> ModelRig:
        return ModelRig(load_model(str(self.model_dir), dtype, device), num_blocks=160)


def qwen_case(folder: Path) -> Case:
    model_dir = make_qwen_vl(folder)
    return Case(model_dir, answers_of(QwenReference(model_dir), QWEN_LAYOUTS))


def gemma_case(folder: Path) -> Case:
    """Its window is smaller than an image."""
    model_dir = make_gemma(folder, seed=1, window=10, layer_types="lglgl", tie_embeddings=False, attention_bias=True)
    return Case(model_dir, answers_of(GemmaReference(model_dir), GEMMA_LAYOUTS))


def answers_of(reference: Any, layouts: list[Layout]) -> list[tuple[Question, list[int], torch.Tensor]]:
    return [decisive_question(reference, layout, NUM_TOKENS, MIN_MARGIN) for layout in layouts]


@pytest.fixture(scope="module", params=[qwen_case, gemma_case], ids=["qwen2_5_vl", "gemma3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made: Case = request.param(tmp_path_factory.mktemp("media") / "model")
    return made


@pytest.mark.parametrize("chunk_tokens", [10_000, 16, 7])
def test_float32_answers_and_logits_are_those_of_transformers(case: Case, chunk_tokens: int) -> None:
    for question, tokens, logits in case.answers:
        rig = case.rig()
        sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
        while len(sequence.generated) < NUM_TOKENS:
            rig.step([sequence], chunk_tokens)
            if sequence.generated:
                expected = logits[len(sequence.generated) - 1]
                torch.testing.assert_close(rig.logits[0].cpu(), expected, rtol=2e-4, atol=2e-4)
        assert sequence.generated == tokens


def test_float32_answers_of_a_mixed_batch(case: Case) -> None:
    rig = case.rig()
    sequences = [rig.add(question.prompt, NUM_TOKENS, question.images) for question, _, _ in case.answers]
    rig.generate(sequences, NUM_TOKENS, 13)
    assert [sequence.generated for sequence in sequences] == [tokens for _, tokens, _ in case.answers]


def test_another_image_is_another_answer(case: Case) -> None:
    """Exactness can fail: rows of an image in another order are seen."""
    question, tokens, _ = case.answers[1]
    [image] = question.images
    rig = case.rig()
    sequence = rig.add(question.prompt, NUM_TOKENS, [PlacedImage(image.offset, image.rows.roll(1, 0), image.grid)])
    rig.generate([sequence], NUM_TOKENS)
    assert sequence.generated != tokens


def test_bfloat16_logits_are_close(case: Case) -> None:
    for question, _, logits in case.answers:
        rig = case.rig("bfloat16")
        rig.step([rig.add(question.prompt, 1, question.images)])
        distance = (rig.logits[0].float().cpu() - logits[0]).norm() / logits[0].norm()
        assert distance < BFLOAT16_TOLERANCE
