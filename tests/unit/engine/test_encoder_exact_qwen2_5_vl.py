"""Qwen2.5-VL's text side answers as `transformers` does, token by token, in float32 on the CPU.

Embeddings of images are those of transformers' own tower.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import YARN_SCALING
from model_rig import ModelRig, PlacedImage, RigSequence
from safetensors.torch import load_file, save_file
from vl_checkpoints import (
    Layout,
    Question,
    QwenReference,
    decisive_question,
    flatten_config,
    make_qwen_vl,
    rename_tensors,
)

from kvrelay_core.media.mrope import Components
from kvrelay_engine.loader import load_model

NUM_TOKENS = 24
MIN_MARGIN = 2e-4  # between the best two logits of every token: far above what rounding does
LAYOUTS: dict[str, Layout] = {
    "text only": [40],
    "first": [(1, 4, 6), 9],
    "middle": [21, (1, 8, 6), 17],
    "last": [9, (1, 6, 8), 1],
    "adjacent": [5, (1, 4, 4), 2, (1, 2, 8), 2, (1, 6, 4), 6],
    "of different sizes": [3, (1, 2, 2), 15, (1, 12, 4), 1, (1, 8, 14), 4],
    "nothing but images": [(1, 10, 4), 1, (1, 4, 10), 1],
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, yarn": {"seed": 1, "tie_embeddings": True, "rope_scaling": YARN_SCALING},
}


@dataclasses.dataclass
class Case:
    model_dir: Path
    reference: QwenReference
    answers: dict[str, tuple[Question, list[int], torch.Tensor]]

    def rig(self) -> ModelRig:
        return ModelRig(load_model(str(self.model_dir), "float32", "cpu"), num_blocks=160)


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    torch.set_num_threads(1)
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            model_dir = make_qwen_vl(tmp_path_factory.mktemp("qwen_vl") / "model", **CHECKPOINTS[name])
            reference = QwenReference(model_dir)
            answers = {
                place: decisive_question(reference, layout, NUM_TOKENS, MIN_MARGIN) for place, layout in LAYOUTS.items()
            }
            made[name] = Case(model_dir, reference, answers)
        return made[name]

    return make


@pytest.fixture(params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    return make_case(request.param)


@pytest.fixture
def plain(make_case: Callable[[str], Case]) -> Case:
    return make_case("plain")


def answer(rig: ModelRig, question: Question, change: Callable[[RigSequence], None] | None = None) -> list[int]:
    sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
    if change is not None:
        change(sequence)
    rig.generate([sequence], NUM_TOKENS)
    return sequence.generated


@pytest.mark.parametrize("chunk_tokens", [10_000, 16, 7, 1])
@pytest.mark.parametrize("place", LAYOUTS)
def test_encoder_exact_each_prompt_alone(case: Case, place: str, chunk_tokens: int) -> None:
    """One chunk, chunks that split images anywhere, tokens one by one; then decoding."""
    question, tokens, logits = case.answers[place]
    rig = case.rig()
    sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
    while len(sequence.generated) < NUM_TOKENS:
        rig.step([sequence], chunk_tokens)
        if sequence.generated:
            expected = logits[len(sequence.generated) - 1]
            torch.testing.assert_close(rig.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert sequence.generated == tokens


def test_encoder_exact_mixed_batch(case: Case) -> None:
    """Text and images beside each other, and prompts that still are computed beside those that decode."""
    rig = case.rig()
    sequences = [rig.add(question.prompt, NUM_TOKENS, question.images) for question, _, _ in case.answers.values()]
    rig.generate(sequences, NUM_TOKENS, 13)
    assert [sequence.generated for sequence in sequences] == [tokens for _, tokens, _ in case.answers.values()]


def test_encoder_exact_prompt_that_ends_in_an_image(plain: Case) -> None:
    """Against forward passes over the whole: `generate` goes on from the last patch here, as no forward pass does."""
    question = plain.reference.question([9, (1, 6, 8)], 0)
    tokens = answer(plain.rig(), question)
    types = torch.cat([question.inputs["mm_token_type_ids"], torch.zeros(1, NUM_TOKENS, dtype=torch.int32)], dim=1)
    with torch.inference_mode():
        logits = plain.reference.model(
            input_ids=torch.tensor([question.prompt + tokens]),
            pixel_values=question.inputs["pixel_values"],
            image_grid_thw=question.inputs["image_grid_thw"],
            mm_token_type_ids=types,
        ).logits[0]
    assert logits[len(question.prompt) - 1 : -1].argmax(-1).tolist() == tokens


def nested_name(name: str) -> str:
    return f"model.{name}" if name.startswith("visual.") else re.sub(r"^model\.", "model.language_model.", name)


@pytest.mark.parametrize("is_flat", [True, False], ids=["flat config", "nested config"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested names", "short names"])
def test_encoder_exact_whatever_form_the_checkpoint_has(
    plain: Case, is_flat: bool, is_nested: bool, tmp_path: Path
) -> None:
    copy = shutil.copytree(plain.model_dir, tmp_path / "copy")
    if is_flat:
        flatten_config(copy)
    if is_nested:
        rename_tensors(copy, nested_name)
    question, tokens, _ = plain.answers["middle"]
    assert answer(ModelRig(load_model(str(copy), "float32", "cpu")), question) == tokens


# ------------------------------------------------------------------------------ the oracle can fail


def without(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a model computes with that has forgotten the tensor: norms by one, all else by zero."""
    return torch.ones_like(tensor) if name.endswith("norm.weight") else torch.zeros_like(tensor)


def test_encoder_exact_every_tensor_class_matters(plain: Case, tmp_path: Path) -> None:
    question, tokens, _ = plain.answers["middle"]
    tensors = load_file(plain.model_dir / "model.safetensors")
    classes = {re.sub(r"\.\d+\.", ".*.", name) for name in tensors if not name.startswith("visual")}
    assert len(classes) == 15
    copy = shutil.copytree(plain.model_dir, tmp_path / "copy")
    for dropped in sorted(classes):
        altered = {
            name: without(name, tensor) if re.sub(r"\.\d+\.", ".*.", name) == dropped else tensor
            for name, tensor in tensors.items()
        }
        save_file(altered, copy / "model.safetensors")
        rig = ModelRig(load_model(str(copy), "float32", "cpu"))
        assert answer(rig, question) != tokens, f"{dropped} does not matter"


def swapped(first: int, second: int) -> Callable[[Components], Components]:
    def swap(components: Components) -> Components:
        parts = list(components)
        parts[first], parts[second] = parts[second], parts[first]
        return parts[0], parts[1], parts[2]

    return swap


WRONG_POSITIONS: dict[str, Callable[[Components], Components]] = {
    "time and height swapped": swapped(0, 1),
    "time and width swapped": swapped(0, 2),
    "height and width swapped": swapped(1, 2),
    "time everywhere": lambda parts: (parts[0], parts[0], parts[0]),
    "no height": lambda parts: (parts[0], parts[0], parts[2]),
    "no width": lambda parts: (parts[0], parts[1], parts[0]),
    "one token late": lambda parts: (parts[0], [0, *parts[1][:-1]], parts[2]),
}


@pytest.mark.parametrize("wrong", WRONG_POSITIONS)
def test_encoder_exact_every_component_of_a_position_matters(plain: Case, wrong: str) -> None:
    question, tokens, _ = plain.answers["middle"]

    def change(sequence: RigSequence) -> None:
        assert sequence.positions is not None
        sequence.positions = dataclasses.replace(
            sequence.positions, prompt=WRONG_POSITIONS[wrong](sequence.positions.prompt)
        )

    assert answer(plain.rig(), question, change) != tokens


@pytest.mark.parametrize("place", [place for place in LAYOUTS if place != "text only"])
def test_encoder_exact_positions_of_text_alone_are_wrong(plain: Case, place: str) -> None:
    question, tokens, _ = plain.answers[place]

    def change(sequence: RigSequence) -> None:
        sequence.positions = None

    assert answer(plain.rig(), question, change) != tokens


def test_encoder_exact_the_step_of_later_positions_matters(plain: Case) -> None:
    question, tokens, _ = plain.answers["middle"]

    def change(sequence: RigSequence) -> None:
        assert sequence.positions is not None
        sequence.positions = dataclasses.replace(sequence.positions, delta=sequence.positions.delta + 1)

    generated = answer(plain.rig(), question, change)
    assert generated[0] == tokens[0]
    assert generated != tokens


def altered_rows(question: Question, change: Callable[[torch.Tensor], torch.Tensor]) -> Question:
    images = [PlacedImage(image.offset, change(image.rows), image.grid) for image in question.images]
    return Question(question.prompt, images)


def test_encoder_exact_every_row_of_an_image_matters(plain: Case) -> None:
    question, tokens, _ = plain.answers["middle"]
    rig = plain.rig()
    other = plain.reference.question(LAYOUTS["middle"], 77)
    for row in range(math.prod(question.images[0].grid) // 4):

        def change(rows: torch.Tensor, row: int = row) -> torch.Tensor:
            rows = rows.clone()
            rows[row] = other.images[0].rows[row]
            return rows

        sequence = rig.add(question.prompt, 1, altered_rows(question, change).images)
        rig.step([sequence])
        expected = plain.answers["middle"][2][0]
        assert (rig.logits[0] - expected).abs().max() > 1e-2, f"row {row} does not matter"
        rig.free_blocks += sequence.block_table
    assert answer(rig, altered_rows(question, lambda rows: rows.roll(1, 0))) != tokens
    assert answer(rig, altered_rows(question, lambda rows: other.images[0].rows)) != tokens
    assert answer(rig, altered_rows(question, torch.zeros_like)) != tokens


def test_encoder_exact_swapped_images_matter(plain: Case) -> None:
    question, tokens, _ = plain.answers["adjacent"]
    first, second, third = question.images
    swapped_rows = [
        PlacedImage(first.offset, second.rows, first.grid),
        PlacedImage(second.offset, first.rows, second.grid),
        third,
    ]
    assert answer(plain.rig(), Question(question.prompt, swapped_rows)) != tokens
