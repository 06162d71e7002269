"""The image sides on an NVIDIA GPU: the CPU's embeddings in float32, close to them in bfloat16, for pictures of any
size in any company."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_checkpoints import make_gemma3, make_qwen2_5_vl
from vision_rig import difference, embed, pictures

from kvrelay_engine.vision.loader import LoadedTower, load_tower

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

# Heads of 80, windows of 64 patches and an odd inner size, as the 7B model has them.
_AS_7B: dict[str, Any] = {
    "depth": 3, "hidden_size": 320, "intermediate_size": 172, "num_heads": 4, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [1], "out_hidden_size": 64,
}  # fmt: skip
_AS_7B_PIXELS: dict[str, Any] = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 280 * 280}
TOWERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen2_5_vl as 7B": partial(make_qwen2_5_vl, vision=_AS_7B, processor=_AS_7B_PIXELS),
    "gemma3": make_gemma3,
    "gemma3 with crops": partial(make_gemma3, pan_and_scan=True),
}
SIZES = [(64, 64), (24, 40), (41, 37), (200, 90), (31, 300), (16, 256), (500, 300)]
FLOAT32_TOLERANCE = 5e-5
BFLOAT16_TOLERANCE = 0.1


@pytest.fixture(scope="module", params=TOWERS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TOWERS[request.param](tmp_path_factory.mktemp("towers") / "model")


@pytest.fixture(scope="module")
def on_cpu(model_dir: Path) -> LoadedTower:
    return load_tower(str(model_dir), "float32", "cpu")


@pytest.fixture(scope="module")
def on_gpu(model_dir: Path) -> LoadedTower:
    return load_tower(str(model_dir), "float32", "cuda")


def test_float32_embeddings_are_those_of_the_cpu(on_cpu: LoadedTower, on_gpu: LoadedTower) -> None:
    data = pictures(SIZES)
    expected = embed(on_cpu, *data)
    found = embed(on_gpu, *data)
    assert (found.device.type, found.dtype) == ("cuda", torch.float32)
    assert difference(found.cpu(), expected) < FLOAT32_TOLERANCE


def test_a_batch_gives_the_same_as_one_by_one(on_gpu: LoadedTower) -> None:
    data = pictures(SIZES)
    together = embed(on_gpu, *data, *reversed(data))
    alone = [embed(on_gpu, item) for item in data]
    assert difference(together, torch.cat([*alone, *reversed(alone)])) < FLOAT32_TOLERANCE


def test_another_picture_gives_other_embeddings(on_gpu: LoadedTower) -> None:
    first, second = pictures([SIZES[0]] * 2)
    assert difference(embed(on_gpu, first), embed(on_gpu, second)) > 100 * FLOAT32_TOLERANCE


def test_bfloat16_embeddings_are_close(model_dir: Path, on_cpu: LoadedTower) -> None:
    data = pictures(SIZES)
    found = embed(load_tower(str(model_dir), "bfloat16", "cuda"), *data)
    assert found.dtype == torch.bfloat16
    assert 0 < difference(found.float().cpu(), embed(on_cpu, *data)) < BFLOAT16_TOLERANCE
