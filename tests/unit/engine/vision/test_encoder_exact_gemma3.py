"""Gemma 3's image side gives what transformers gives: pixels, crops, embeddings; and whatever it is given matters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quiet_transformers
from PIL import Image
from safetensors.torch import load_file
from vision_checkpoints import alter_json, as_bytes, draw_picture, make_gemma3
from vision_rig import difference, embed, load_without, pictures, tensor_class
from vl_checkpoints import rename_tensors

from kvrelay_core.errors import ConfigError
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.loader import LoadedTower, load_tower

# Width, height, and the crops with pan-and-scan: by proportion, by the smallest crop, by the most; either way.
CROPS = {
    (32, 32): 0,
    (5, 7): 0,
    (37, 32): 0,
    (40, 32): 2,
    (64, 40): 2,
    (40, 101): 3,
    (200, 30): 3,
    (31, 200): 3,
    (90, 15): 0,
    (33, 20): 2,
    (31, 20): 2,
    (29, 20): 0,
    (100, 33): 3,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_gemma3(tmp_path_factory.mktemp("vision") / "gemma3")


@pytest.fixture(scope="module")
def cropping_dir(model_dir: Path) -> Path:
    """The same weights with pan-and-scan."""
    cropping = shutil.copytree(model_dir, model_dir.parent / "cropping")
    alter_json(cropping / "preprocessor_config.json", do_pan_and_scan=True)
    return cropping


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedTower:
    return load_tower(str(model_dir), "float32", "cpu")


@pytest.fixture(scope="module")
def cropping(cropping_dir: Path) -> LoadedTower:
    return load_tower(str(cropping_dir), "float32", "cpu")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    import transformers

    with quiet_transformers():
        return transformers.Gemma3ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()


def reference_pixels(model_dir: Path, data: Sequence[bytes]) -> tuple[torch.Tensor, list[int]]:
    """Of the views of all pictures, and how many crops each has."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    processor = Gemma3ImageProcessorPil.from_pretrained(model_dir)
    found = processor([Image.open(BytesIO(item)) for item in data], return_tensors="pt", do_convert_rgb=True)
    pixels: torch.Tensor = found["pixel_values"]
    return pixels, found["num_crops"].tolist()


def reference_embeddings(reference: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        rows: torch.Tensor = reference.get_image_features(pixels).pooler_output
    return rows.flatten(0, 1)


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize(("size", "num_crops"), CROPS.items(), ids=str)
def test_encoder_exact_gemma_pixels(
    size: tuple[int, int], num_crops: int, loaded: LoadedTower, cropping: LoadedTower, cropping_dir: Path
) -> None:
    data = as_bytes(draw_picture(*size))
    wanted, crops = reference_pixels(cropping_dir, [data])
    whole, cropped = loaded.processor.process(data), cropping.processor.process(data)
    assert crops == [num_crops] and cropped.pixels.shape == wanted.shape
    assert (cropped.num_tokens, cropped.num_patches) == (16 * (1 + num_crops), 64 * (1 + num_crops))
    assert (cropped.pixels - wanted).abs().max() <= 1e-6
    assert torch.equal(whole.pixels, cropped.pixels[:1]) and whole.num_tokens == 16


def test_encoder_exact_gemma_one_picture(loaded: LoadedTower, model_dir: Path, reference: Any) -> None:
    for data in pictures(list(CROPS)):
        wanted = reference_embeddings(reference, reference_pixels(model_dir, [data])[0])
        found = embed(loaded, data)
        assert found.shape[1] == loaded.hidden_size == 64
        assert difference(found, wanted) <= 1e-5


def test_encoder_exact_gemma_batch_with_crops(cropping: LoadedTower, cropping_dir: Path, reference: Any) -> None:
    data = pictures(list(CROPS))
    inputs = [cropping.processor.process(item) for item in data]
    found = cropping.tower.encode(inputs)
    assert [len(rows) for rows in found] == [16 * (1 + crops) for crops in CROPS.values()]
    wanted = reference_embeddings(reference, reference_pixels(cropping_dir, data)[0])
    assert difference(torch.cat(found), wanted) <= 1e-5


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA"])
def test_encoder_exact_gemma_modes(mode: str, cropping: LoadedTower, cropping_dir: Path) -> None:
    picture = draw_picture(64, 30, mode=mode)
    if mode == "RGBA":
        picture.putalpha(draw_picture(64, 30, seed=1, mode="L"))
    data = as_bytes(picture, "JPEG" if mode == "CMYK" else "PNG")
    wanted, _ = reference_pixels(cropping_dir, [data])
    assert (cropping.processor.process(data).pixels - wanted).abs().max() <= 1e-6


# -------------------------------------------------------------------------------------- ways to the same answer


def test_a_batch_gives_the_same_as_one_by_one(cropping: LoadedTower) -> None:
    data = pictures(list(CROPS))
    together = embed(cropping, *data, *reversed(data))
    alone = [embed(cropping, item) for item in data]
    assert difference(together, torch.cat([*alone, *reversed(alone)])) <= 1e-6


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: re.sub("^vision_tower", "vision_tower.vision_model", name),
        lambda name: re.sub("^(vision_tower|multi_modal)", r"model.\1", name),
        lambda name: re.sub("^multi_modal", "model.multi_modal", re.sub("^v", "model.v", name)).replace(
            "vision_tower", "vision_tower.vision_model"
        ),
    ],
    ids=["published", "nested", "nested with the model's name"],
)
def test_any_style_of_names(rename: Callable[[str], str], model_dir: Path, loaded: LoadedTower, tmp_path: Path) -> None:
    renamed = shutil.copytree(model_dir, tmp_path / "renamed")
    rename_tensors(renamed, rename)
    assert set(load_file(renamed / "model.safetensors")) != set(load_file(model_dir / "model.safetensors"))
    data = pictures(list(CROPS))
    assert torch.equal(embed(load_tower(str(renamed), "auto", "cpu"), *data), embed(loaded, *data))


def test_bfloat16_is_about_the_same(model_dir: Path, loaded: LoadedTower) -> None:
    half, data = load_tower(str(model_dir), "bfloat16", "cpu"), pictures(list(CROPS))
    found = embed(half, *data)
    assert found.dtype == torch.bfloat16
    assert 0 < difference(found.float(), embed(loaded, *data)) < 0.1


# -------------------------------------------------------------------------------------------- what must matter


def test_encoder_exact_gemma_every_tensor_matters(model_dir: Path, loaded: LoadedTower, tmp_path: Path) -> None:
    data = pictures(list(CROPS)[:4])
    before = embed(loaded, *data)
    tensors = load_file(model_dir / "model.safetensors")
    names = {tensor_class(name) for name in tensors if name.startswith(("vision_tower", "multi_modal"))}
    assert len(names) == 23
    for forgotten in sorted(names):
        found = embed(load_without(model_dir, tmp_path / "altered", forgotten, slice(None)), *data)
        if forgotten.endswith("k_proj.bias"):
            # Without RoPE it adds the same to a query's every score.
            assert difference(found, before) < 1e-5
        else:
            assert difference(found, before) > 1e-3, f"{forgotten} does not matter"


def test_encoder_exact_gemma_the_picture_matters(loaded: LoadedTower) -> None:
    answers = [embed(loaded, as_bytes(draw_picture(40, 40, seed=seed))) for seed in range(6)]
    for index, one in enumerate(answers):
        assert all(difference(one, other) > 1e-2 for other in answers[:index])


def test_encoder_exact_gemma_the_order_of_pixels_matters(loaded: LoadedTower) -> None:
    image = loaded.processor.process(pictures([(64, 48)])[0])
    before = loaded.tower.encode([image])[0]
    for pixels in (image.pixels.transpose(2, 3), image.pixels.flip(1), image.pixels.roll(4, dims=3)):
        altered = ImageInput(pixels.contiguous(), image.grid, image.num_patches, image.num_tokens)
        assert difference(loaded.tower.encode([altered])[0], before) > 1e-3


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": "clip_vision_model"}, "model_type 'clip_vision_model' is not supported"),
        ({"num_channels": 1}, "num_channels must be 3"),
        ({"num_attention_heads": 5}, "48 is no multiple of 5 heads"),
        ({"patch_size": 5}, "must divide a picture of 32 pixels a side, cut into patches of 5"),
        ({"image_size": 24}, "mm_tokens_per_image 16 must divide a picture of 24 pixels"),
        ({"image_size": 64}, "makes 32 x 32 pixels, the tower in config.json takes 64 x 64"),
        ({"num_hidden_layers": 1}, r"unexpected: vision_tower\.encoder\.layers\.1"),
    ],
)
def test_bad_config(fields: dict[str, object], named: str, model_dir: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(model_dir, tmp_path / "altered")
    vision = json.loads((altered / "config.json").read_text())["vision_config"]
    alter_json(altered / "config.json", vision_config={**vision, **fields})
    with pytest.raises(ConfigError, match=named):
        load_tower(str(altered), "auto", "cpu")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": {"height": 32, "width": 48}}, "makes 48 x 32 pixels, the tower in config.json takes 32 x 32"),
        ({"pan_and_scan_max_num_crops": 17}, "pan_and_scan_min_crop_size 16 must be at least .* 17"),
    ],
)
def test_bad_processor(fields: dict[str, object], named: str, cropping_dir: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(cropping_dir, tmp_path / "altered")
    alter_json(altered / "preprocessor_config.json", **fields)
    with pytest.raises(ConfigError, match=named):
        load_tower(str(altered), "auto", "cpu")


def test_another_length_of_views_is_refused(model_dir: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(model_dir, tmp_path / "altered")
    image = json.loads((altered / "preprocessor_config.json").read_text())
    (altered / "processor_config.json").write_text(json.dumps({"image_processor": image, "image_seq_length": 64}))
    with pytest.raises(ConfigError, match=r"image_seq_length of the processor is 64, mm_tokens_per_image .* 16"):
        load_tower(str(altered), "auto", "cpu")


def test_pan_and_scan_is_of_the_fingerprint(loaded: LoadedTower, cropping: LoadedTower) -> None:
    assert loaded.fingerprint != cropping.fingerprint
