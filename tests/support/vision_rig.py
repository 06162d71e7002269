"""What the tests of the image side share: pictures in, embeddings out, and towers that have forgotten a tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from vision_checkpoints import alter_tensors, as_bytes, draw_picture

from kvrelay_engine.vision.loader import LoadedTower, load_tower

# Weights by which something is multiplied: a tower without them computes with 1. Gemma's projector adds 1 itself.
_SCALE = re.compile(r"(norm\d?|ln_q|layernorm)\.weight$")


def pictures(sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    return [as_bytes(draw_picture(*size, seed=index)) for index, size in enumerate(sizes)]


def embed(loaded: LoadedTower, *data: bytes) -> torch.Tensor:
    return torch.cat(loaded.tower.encode([loaded.processor.process(item) for item in data]))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the largest element."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def tensor_class(name: str) -> str:
    return re.sub(r"(blocks|layers)\.\d+", r"\1.*", name)


def load_without(model_dir: Path, altered: Path, forgotten: str, part: slice) -> LoadedTower:
    """The tower without those rows of the tensors of a class; `altered` is written."""

    def forget(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor_class(name) != forgotten:
            return tensor
        rest = tensor.clone()
        rest[part] = 1.0 if _SCALE.search(name) and "mm_soft" not in name else 0.0
        return rest

    shutil.copytree(model_dir, altered, dirs_exist_ok=True)
    alter_tensors(altered, forget)
    return load_tower(str(altered), "float32", "cpu")
