"""Gemma 3's text side answers as `transformers` does, token by token, in float32 on the CPU.

Embeddings of images are those of transformers' own tower and projector. Images do not touch each other: transformers
would take two that do for one, which its processor never makes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rig import ModelRig, PlacedImage
from safetensors.torch import load_file, save_file
from vl_checkpoints import (
    GEMMA_IMAGE,
    GemmaReference,
    Layout,
    Question,
    decisive_question,
    make_gemma,
    rename_tensors,
)

from kvrelay_engine.loader import LoadedModel, load_model
from kvrelay_transfer.layout import KvLayout

NUM_TOKENS = 24
MIN_MARGIN = 2e-4  # between the best two logits of every token: far above what rounding does
LAYOUTS: dict[str, Layout] = {
    "text only": [60],
    "first": [GEMMA_IMAGE, 19],
    "middle": [21, GEMMA_IMAGE, 17],
    "last": [29, GEMMA_IMAGE, 1],
    "adjacent": [3, GEMMA_IMAGE, 2, GEMMA_IMAGE, 1, GEMMA_IMAGE, 6],
    "far behind": [1, GEMMA_IMAGE, 70],
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "window of an image and more": {},
    "window of less than an image": {
        "seed": 1,
        "window": 10,
        "layer_types": "lglgl",
        "tie_embeddings": False,
        "attention_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "text model": {"text_only": True, "seed": 2, "layer_types": "lllg"},
}


@dataclasses.dataclass
class Case:
    model_dir: Path
    reference: GemmaReference
    answers: dict[str, tuple[Question, list[int], torch.Tensor]]

    def load(self) -> LoadedModel:
        return load_model(str(self.model_dir), "float32", "cpu")

    def rig(self) -> ModelRig:
        return ModelRig(self.load(), num_blocks=160)


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    torch.set_num_threads(1)
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            arguments = CHECKPOINTS[name]
            text_only = arguments.get("text_only", False)
            model_dir = make_gemma(tmp_path_factory.mktemp("gemma") / "model", **arguments)
            reference = GemmaReference(model_dir, text_only=text_only)
            answers = {
                place: decisive_question(reference, layout, NUM_TOKENS, MIN_MARGIN)
                for place, layout in LAYOUTS.items()
                if place == "text only" or not text_only
            }
            made[name] = Case(model_dir, reference, answers)
        return made[name]

    return make


@pytest.fixture(params=CHECKPOINTS)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    return make_case(request.param)


@pytest.fixture
def wide(make_case: Callable[[str], Case]) -> Case:
    return make_case("window of an image and more")


@pytest.fixture
def narrow(make_case: Callable[[str], Case]) -> Case:
    return make_case("window of less than an image")


def answer(rig: ModelRig, question: Question) -> list[int]:
    sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
    rig.generate([sequence], NUM_TOKENS)
    return sequence.generated


@pytest.mark.parametrize("chunk_tokens", [10_000, 16, 7, 1])
def test_encoder_exact_each_prompt_alone(case: Case, chunk_tokens: int) -> None:
    """One chunk, chunks that split anything but an image, tokens one by one; then decoding."""
    for place, (question, tokens, logits) in case.answers.items():
        rig = case.rig()
        sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
        while len(sequence.generated) < NUM_TOKENS:
            rig.step([sequence], chunk_tokens)
            if sequence.generated:
                expected = logits[len(sequence.generated) - 1]
                torch.testing.assert_close(rig.logits[0], expected, rtol=1e-4, atol=1e-4)
        assert sequence.generated == tokens, place


def test_encoder_exact_mixed_batch(case: Case) -> None:
    """Text and images beside each other, and prompts that still are computed beside those that decode."""
    rig = case.rig()
    sequences = [rig.add(question.prompt, NUM_TOKENS, question.images) for question, _, _ in case.answers.values()]
    rig.generate(sequences, NUM_TOKENS, 13)
    assert [sequence.generated for sequence in sequences] == [tokens for _, tokens, _ in case.answers.values()]


def nested_name(name: str) -> str:
    """As transformers 5 calls the tensors of its own model."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", re.sub("^(vision|multi)", r"model.\1", name))


def test_encoder_exact_nested_names(narrow: Case, tmp_path: Path) -> None:
    copy = shutil.copytree(narrow.model_dir, tmp_path / "copy")
    rename_tensors(copy, lambda name: name.replace("language_model.lm_head", "lm_head"))
    rename_tensors(copy, nested_name)
    question, tokens, _ = narrow.answers["middle"]
    assert answer(ModelRig(load_model(str(copy), "float32", "cpu")), question) == tokens


def test_encoder_exact_legacy_config(narrow: Case, tmp_path: Path) -> None:
    """As transformers 4 wrote it: one theta and scaling, a second theta, a pattern."""
    question, tokens, _ = narrow.answers["middle"]
    copy = shutil.copytree(narrow.model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["rope_theta"] = rope["full_attention"].pop("rope_theta")
    text["rope_scaling"] = rope["full_attention"]
    del text["layer_types"]
    text["sliding_window_pattern"] = 2
    config["torch_dtype"] = config.pop("dtype")
    (copy / "config.json").write_text(json.dumps(config))
    assert answer(ModelRig(load_model(str(copy), "float32", "cpu")), question) == tokens


# ------------------------------------------------------------------------------ the oracle can fail


def test_encoder_exact_every_tensor_class_matters(narrow: Case, tmp_path: Path) -> None:
    question, tokens, _ = narrow.answers["middle"]
    tensors = load_file(narrow.model_dir / "model.safetensors")
    text = {name for name in tensors if not name.startswith(("vision", "multi"))}
    classes = {re.sub(r"\.\d+\.", ".*.", name) for name in text}
    assert len(classes) == 20
    copy = shutil.copytree(narrow.model_dir, tmp_path / "copy")
    for dropped in sorted(classes):
        altered = {
            name: torch.zeros_like(tensor) if re.sub(r"\.\d+\.", ".*.", name) == dropped else tensor
            for name, tensor in tensors.items()
        }
        save_file(altered, copy / "model.safetensors")
        rig = ModelRig(load_model(str(copy), "float32", "cpu"))
        assert answer(rig, question) != tokens, f"{dropped} does not matter"


WRONG_CONFIGS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": 4096},
    "a window of one more": {"sliding_window": 11},
    "a window of one less": {"sliding_window": 9},
    "another scale of scores": {"query_pre_attn_scalar": 24},
    "global first": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] + ["full_attention"] * 2
    },
}


@pytest.mark.parametrize("wrong", WRONG_CONFIGS)
def test_encoder_exact_every_field_matters(narrow: Case, wrong: str, tmp_path: Path) -> None:
    copy = shutil.copytree(narrow.model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"].update(WRONG_CONFIGS[wrong])
    (copy / "config.json").write_text(json.dumps(config))
    for place in ("text only", "middle"):
        question, tokens, _ = narrow.answers[place]
        assert answer(ModelRig(load_model(str(copy), "float32", "cpu")), question) != tokens, place


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("change", [{"rope_theta": 700.0}, {"rope_type": "linear", "factor": 3.0}], ids=str)
def test_encoder_exact_each_kind_of_layer_has_its_rope(
    narrow: Case, layer_type: str, change: dict[str, Any], tmp_path: Path
) -> None:
    question, tokens, _ = narrow.answers["middle"]
    copy = shutil.copytree(narrow.model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_parameters"][layer_type].update(change)
    (copy / "config.json").write_text(json.dumps(config))
    assert answer(ModelRig(load_model(str(copy), "float32", "cpu")), question) != tokens


@pytest.mark.parametrize("place", [place for place in LAYOUTS if place != "text only"])
def test_encoder_exact_images_must_see_ahead(wide: Case, narrow: Case, place: str) -> None:
    for case in (wide, narrow):
        loaded = case.load()
        blind = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, media_see_ahead=False))
        question, tokens, _ = case.answers[place]
        assert answer(ModelRig(blind), question) != tokens


def altered_rows(question: Question, change: Callable[[torch.Tensor], torch.Tensor]) -> Question:
    return Question(question.prompt, [PlacedImage(image.offset, change(image.rows)) for image in question.images])


def test_encoder_exact_every_row_of_an_image_matters(wide: Case) -> None:
    question, tokens, logits = wide.answers["middle"]
    other = wide.reference.question(LAYOUTS["middle"], 77)
    rig = wide.rig()
    for row in range(question.images[0].num_tokens):

        def change(rows: torch.Tensor, row: int = row) -> torch.Tensor:
            rows = rows.clone()
            rows[row] = other.images[0].rows[row]
            return rows

        sequence = rig.add(question.prompt, 1, altered_rows(question, change).images)
        rig.step([sequence])
        assert (rig.logits[0] - logits[0]).abs().max() > 1e-2, f"row {row} does not matter"
        rig.free_blocks += sequence.block_table
    assert answer(rig, altered_rows(question, lambda rows: other.images[0].rows)) != tokens
    assert answer(rig, altered_rows(question, lambda rows: rows.roll(1, 0))) != tokens
    assert answer(rig, altered_rows(question, lambda rows: rows * 8)) != tokens, "rows of images are not scaled"


def test_encoder_exact_swapped_images_matter(wide: Case) -> None:
    question, tokens, _ = wide.answers["adjacent"]
    first, second, third = question.images
    swapped = [PlacedImage(first.offset, second.rows), PlacedImage(second.offset, first.rows), third]
    assert answer(wide.rig(), Question(question.prompt, swapped)) != tokens


def test_encoder_exact_half_precision_is_close(wide: Case) -> None:
    """Norms and the factor of the embedding are rounded nowhere else than in `transformers`."""
    question, _, logits = wide.answers["middle"]
    rig = ModelRig(load_model(str(wide.model_dir), "bfloat16", "cpu"))
    rig.step([rig.add(question.prompt, 1, question.images)])
    assert ((rig.logits[0] - logits[0]).norm() / logits[0].norm()).item() < 0.06


@pytest.mark.parametrize("early", [1, 2])
def test_encoder_exact_blocks_of_the_window_matter(narrow: Case, early: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is freed a block too early is missed."""
    question, tokens, _ = narrow.answers["text only"]
    first_block = KvLayout.first_block
    monkeypatch.setattr(KvLayout, "first_block", lambda layout, n: first_block(layout, n) + early)
    rig = narrow.rig()
    sequence = rig.add(question.prompt, NUM_TOKENS, question.images)
    rig.generate([sequence], NUM_TOKENS, 16)
    assert sequence.generated != tokens
