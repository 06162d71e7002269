"""Qwen2.5-VL's image side gives what transformers gives: pixels, embeddings; and whatever it is given matters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quiet_transformers
from PIL import Image
from safetensors.torch import load_file
from vision_checkpoints import alter_json, as_bytes, draw_picture, make_qwen2_5_vl
from vision_rig import difference, embed, load_without, pictures, tensor_class
from vl_checkpoints import rename_tensors

from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.loader import LoadedTower, load_tower

# Width and height: grown, kept, shrunk; one window, parts of windows in either direction, strips.
SIZES = [(5, 5), (16, 16), (64, 64), (24, 40), (41, 37), (200, 90), (31, 300), (16, 256), (500, 20)]
FEW_SIZES = [(16, 16), (41, 37), (200, 90)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_qwen2_5_vl(tmp_path_factory.mktemp("vision") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedTower:
    return load_tower(str(model_dir), "float32", "cpu")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return load_reference(model_dir)


def load_reference(model_dir: Path) -> Any:
    import transformers

    with quiet_transformers():
        return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference_processor(model_dir: Path) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(model_dir)


def reference_embeddings(reference: Any, processor: Any, data: Sequence[bytes]) -> torch.Tensor:
    inputs = processor([Image.open(BytesIO(item)) for item in data], return_tensors="pt")
    with torch.inference_mode():
        rows = reference.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return torch.cat(list(rows))


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoder_exact_qwen_pixels(size: tuple[int, int], loaded: LoadedTower, reference_processor: Any) -> None:
    picture = draw_picture(*size)
    wanted = reference_processor([picture], return_tensors="pt")
    found = loaded.processor.process(as_bytes(picture))
    assert list(found.grid) == wanted["image_grid_thw"][0].tolist()
    assert found.num_patches == len(found.pixels) == len(wanted["pixel_values"])
    assert (found.pixels - wanted["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoder_exact_qwen_one_picture(
    size: tuple[int, int], loaded: LoadedTower, reference: Any, reference_processor: Any
) -> None:
    data = pictures([size])
    found = embed(loaded, *data)
    assert found.shape[1] == loaded.hidden_size == 64
    assert difference(found, reference_embeddings(reference, reference_processor, data)) <= 1e-5


def test_encoder_exact_qwen_batch(loaded: LoadedTower, reference: Any, reference_processor: Any) -> None:
    data = pictures(SIZES)
    inputs = [loaded.processor.process(item) for item in data]
    found = loaded.tower.encode(inputs)
    assert [len(rows) for rows in found] == [item.num_tokens for item in inputs]
    assert difference(torch.cat(found), reference_embeddings(reference, reference_processor, data)) <= 1e-5


def test_encoder_exact_qwen_any_number_of_inner_units(reference_processor: Any, tmp_path: Path) -> None:
    """Those that are added to a whole multiple change nothing."""
    model_dir = make_qwen2_5_vl(tmp_path / "model", vision={"intermediate_size": 75})
    data = pictures(FEW_SIZES)
    found = embed(load_tower(str(model_dir), "float32", "cpu"), *data)
    assert difference(found, reference_embeddings(load_reference(model_dir), reference_processor, data)) <= 1e-5


def test_encoder_exact_qwen_frames_of_a_video(loaded: LoadedTower, reference: Any) -> None:
    grids = [(3, 6, 4), (1, 4, 4), (2, 10, 6)]
    pixels = [torch.randn(t * h * w, 96, generator=torch.Generator().manual_seed(t)) for t, h, w in grids]
    inputs = [
        ImageInput(patches, grid, len(patches), len(patches) // 4) for patches, grid in zip(pixels, grids, strict=True)
    ]
    with torch.inference_mode():
        wanted = reference.get_image_features(torch.cat(pixels), torch.tensor(grids)).pooler_output
    assert difference(torch.cat(loaded.tower.encode(inputs)), torch.cat(list(wanted))) <= 1e-5


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_encoder_exact_qwen_modes(mode: str, loaded: LoadedTower, reference_processor: Any) -> None:
    picture = draw_picture(40, 30, mode="RGBA" if mode == "LA" else mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(draw_picture(40, 30, seed=1, mode="L"))
    picture = picture.convert(mode)
    data = as_bytes(picture, "JPEG" if mode == "CMYK" else "PNG")
    wanted = reference_processor([Image.open(BytesIO(data))], return_tensors="pt")["pixel_values"]
    found = loaded.processor.process(data).pixels
    assert (found - wanted).abs().max() <= 1e-6


# -------------------------------------------------------------------------------------- ways to the same answer


def test_a_batch_gives_the_same_as_one_by_one(loaded: LoadedTower) -> None:
    data = pictures(SIZES)
    together = embed(loaded, *data, *reversed(data))
    alone = [embed(loaded, item) for item in data]
    assert difference(together, torch.cat([*alone, *reversed(alone)])) <= 1e-6


def test_either_style_of_names(model_dir: Path, loaded: LoadedTower, tmp_path: Path) -> None:
    nested = shutil.copytree(model_dir, tmp_path / "nested")
    assert {name.split(".")[0] for name in load_file(nested / "model.safetensors")} == {"lm_head", "model", "visual"}
    rename_tensors(nested, lambda name: re.sub("^visual", "model.visual", name))
    data = pictures(FEW_SIZES)
    assert torch.equal(embed(load_tower(str(nested), "auto", "cpu"), *data), embed(loaded, *data))


def test_bfloat16_is_about_the_same(model_dir: Path, loaded: LoadedTower) -> None:
    half, data = load_tower(str(model_dir), "bfloat16", "cpu"), pictures(FEW_SIZES)
    found = embed(half, *data)
    assert found.dtype == torch.bfloat16
    assert 0 < difference(found.float(), embed(loaded, *data)) < 0.1
    assert half.weight_bytes * 2 == loaded.weight_bytes


# -------------------------------------------------------------------------------------------- what must matter


def test_encoder_exact_qwen_every_tensor_matters(model_dir: Path, loaded: LoadedTower, tmp_path: Path) -> None:
    data = pictures(FEW_SIZES)
    before = embed(loaded, *data)
    names = {tensor_class(name) for name in load_file(model_dir / "model.safetensors") if name.startswith("visual")}
    assert len(names) == 18
    whole, thirds = slice(None), [slice(first, first + 48) for first in (0, 48, 96)]
    for forgotten in sorted(names):
        for part in thirds if ".qkv." in forgotten else [whole]:
            found = embed(load_without(model_dir, tmp_path / "altered", forgotten, part), *data)
            assert difference(found, before) > 1e-3, f"{forgotten} {part} does not matter"


def test_encoder_exact_qwen_the_picture_matters(loaded: LoadedTower) -> None:
    answers = [embed(loaded, as_bytes(draw_picture(40, 40, seed=seed))) for seed in range(6)]
    for index, one in enumerate(answers):
        assert all(difference(one, other) > 1e-2 for other in answers[:index])


def test_encoder_exact_qwen_the_order_of_patches_matters(loaded: LoadedTower) -> None:
    image = loaded.processor.process(pictures([(64, 48)])[0])
    before = loaded.tower.encode([image])[0]
    swapped = image.pixels.clone()
    swapped[[1, 2]] = image.pixels[[2, 1]]  # as if patches lay in rows, not in squares
    other_side = (1, image.grid[2], image.grid[1])
    for pixels, grid in ((swapped, image.grid), (image.pixels, other_side)):
        altered = ImageInput(pixels, grid, image.num_patches, image.num_tokens)
        assert difference(loaded.tower.encode([altered])[0], before) > 1e-3


@pytest.mark.parametrize(
    "change",
    [{"fullatt_block_indexes": [0, 1]}, {"window_size": 32}, {"rope_parameters": {"rope_theta": 100.0}}],
    ids=lambda change: next(iter(change)),
)
def test_the_config_matters(change: dict[str, Any], model_dir: Path, loaded: LoadedTower, tmp_path: Path) -> None:
    altered = shutil.copytree(model_dir, tmp_path / "altered")
    vision = json.loads((altered / "config.json").read_text())["vision_config"]
    alter_json(altered / "config.json", vision_config={**vision, **change})
    data = pictures([(64, 64)])
    other = load_tower(str(altered), "float32", "cpu")
    assert difference(embed(other, *data), embed(loaded, *data)) > 1e-3
    assert other.fingerprint != loaded.fingerprint
