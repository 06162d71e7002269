"""Loading the image side: what is read, what is refused, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from vision_checkpoints import (
    GEMMA_TOKENS,
    QWEN_TOKENS,
    alter_json,
    alter_tensors,
    as_bytes,
    draw_picture,
    make_gemma3,
    make_qwen2_5_vl,
)

from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.media.processor_config import read_processor_config
from kvrelay_engine.loader import load_model
from kvrelay_engine.vision import loader
from kvrelay_engine.vision.loader import load_tower


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_qwen2_5_vl(tmp_path_factory.mktemp("vision") / "qwen2_5_vl")


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(model_dir, tmp_path / "copy")


def fingerprint(directory: Path, dtype: str = "float32") -> bytes:
    return load_tower(str(directory), dtype, "cpu").fingerprint


def alter_vision(directory: Path, **fields: object) -> None:
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    alter_json(directory / "config.json", vision_config={**vision, **fields})


# ------------------------------------------------------------------------------------------- what is read


def test_only_tensors_of_the_tower_are_read(model_dir: Path, copy: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    assert 0 < len(tower) < len(tensors)
    assert load_tower(str(model_dir), "auto", "cpu").weight_bytes == sum(tensor.nbytes for tensor in tower.values())
    save_file(tower, copy / "model.safetensors")
    assert fingerprint(copy) == fingerprint(model_dir)


@pytest.mark.parametrize(("make", "tokens"), [(make_qwen2_5_vl, QWEN_TOKENS), (make_gemma3, GEMMA_TOKENS)])
def test_both_sides_of_a_checkpoint_fit(make: Callable[[Path], Path], tokens: tuple[str, ...], tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    text, tower = load_model(str(whole), "auto", "cpu"), load_tower(str(whole), "auto", "cpu")
    assert text.config.hidden_size == tower.hidden_size and text.weight_bytes > 0
    processor = read_processor_config(whole)
    assert processor is not None
    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    assert tokenizer.id_to_token(processor.image_token_id) == tokens[1]
    assert tokenizer.encode("".join(tokens)).tokens == list(tokens)


def test_missing_unexpected_and_wrong_tensors_are_named(model_dir: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual.blocks.1.attn.qkv.bias"]
    tensors["visual.blocks.0.mlp.extra"] = torch.zeros(2)
    tensors["visual.merger.ln_q.weight"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_tower(str(copy), "auto", "cpu")
    assert "missing: visual.blocks.1.attn.qkv.bias;" in caught.value.message
    assert "visual.merger.ln_q.weight has shape [3], config.json says [48]" in caught.value.message
    assert "unexpected: visual.blocks.0.mlp.extra" in caught.value.message


def test_the_processor_may_be_a_section(model_dir: Path, copy: Path) -> None:
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    other = {**processor, "max_pixels": 32 * 32}
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": other, "processor_class": "any"}))
    data = as_bytes(draw_picture(64, 64))
    assert load_tower(str(model_dir), "auto", "cpu").processor.process(data).grid == (1, 16, 16)
    assert load_tower(str(copy), "auto", "cpu").processor.process(data).grid == (1, 8, 8)
    (copy / "processor_config.json").write_text(json.dumps({"processor_class": "any"}))
    assert load_tower(str(copy), "auto", "cpu").processor.process(data).grid == (1, 16, 16)


def test_sizes_may_be_edges(model_dir: Path, copy: Path) -> None:
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    del processor["min_pixels"], processor["max_pixels"]
    processor["size"] = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    (copy / "preprocessor_config.json").write_text(json.dumps(processor))
    assert fingerprint(copy) == fingerprint(model_dir)


# ---------------------------------------------------------------------------------------- what is refused


def test_a_model_without_an_image_side(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_type llama has no image side that is supported; supported are qwen"):
        load_tower(str(make_checkpoint(tmp_path / "llama", "llama")), "auto", "cpu")


def test_no_processor(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        load_tower(str(copy), "auto", "cpu")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"patch_size": 14}, "patch_size is 14, that of the tower in config.json 4"),
        ({"merge_size": 1}, "merge_size is 1, that of the tower in config.json 2"),
        ({"resample": 9}, r"resample 9 is not a filter of Pillow; known are 0 \(nearest\)"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"image_mean": [0.5]}, "settings are incomplete or malformed: .*"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must not hold 0"),
    ],
)
def test_bad_processor(fields: dict[str, object], named: str, copy: Path) -> None:
    alter_json(copy / "preprocessor_config.json", **fields)
    with pytest.raises(ConfigError, match=named):
        load_tower(str(copy), "auto", "cpu")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"in_channels": 4}, "in_channels must be 3"),
        ({"num_heads": 5}, "48 over 5 heads must be a multiple of 4"),
        ({"window_size": 7}, "window_size 7 must hold 2 patches of 4 pixels"),
        ({"depth": 0}, "num_layers must be at least 1"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_type 'default' is not supported"),
        ({"fullatt_block_indexes": ["1"]}, "fullatt_block_indexes must be a list of integers"),
    ],
)
def test_bad_config(fields: dict[str, object], named: str, copy: Path) -> None:
    alter_vision(copy, **fields)
    with pytest.raises(ConfigError, match=named):
        load_tower(str(copy), "auto", "cpu")


def test_a_tower_that_does_not_fit(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: 1024)
    with pytest.raises(ConfigError, match=r"the image side of .* in float32 on cpu needs .* are missing"):
        load_tower(str(model_dir), "auto", "cpu")


def test_a_strip_is_refused(model_dir: Path) -> None:
    processor = load_tower(str(model_dir), "auto", "cpu").processor
    with pytest.raises(InvalidRequestError, match=r"403 x 2 pixels; one side may be at most 200 times the other"):
        processor.process(as_bytes(draw_picture(403, 2)))
    assert processor.process(as_bytes(draw_picture(400, 2))).num_tokens > 0


# -------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_the_image_side(model_dir: Path, copy: Path) -> None:
    def alter_text(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name.startswith("visual.") else tensor + 1

    alter_tensors(copy, alter_text)
    alter_json(copy / "config.json", _name_or_path="elsewhere")
    assert len(fingerprint(model_dir)) == 32
    assert fingerprint(copy) == fingerprint(model_dir)


def test_fingerprint_changes_with_one_weight(model_dir: Path, copy: Path) -> None:
    def nudge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1e-3 if name == "visual.blocks.2.norm1.weight" else tensor

    alter_tensors(copy, nudge)
    assert fingerprint(copy) != fingerprint(model_dir)


def test_fingerprint_changes_with_all_that_is_computed(model_dir: Path, copy: Path) -> None:
    found = {fingerprint(model_dir), fingerprint(model_dir, "bfloat16")}
    alter_vision(copy, window_size=32)
    found.add(fingerprint(copy))
    alter_json(copy / "preprocessor_config.json", max_pixels=32 * 32)
    found.add(fingerprint(copy))
    alter_json(copy / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    found.add(fingerprint(copy))
    assert len(found) == 5
