"""The oracle can fail: whatever a checkpoint holds, a model that leaves it out gives another answer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, make_variant
from model_rig import ModelRig, greedy
from oracle import make_prompt
from safetensors.torch import load_file, save_file

from kvrelay_engine.loader import load_model

PROMPT = make_prompt(384, 70, 0)
NUM_TOKENS = 32
SCALED = [name for name, variant in VARIANTS.items() if "rope_scaling" in variant]

Checkpoint = Callable[[str], tuple[Path, list[int]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The directory of a variant and its answer to the prompt."""
    torch.set_num_threads(1)
    made: dict[str, tuple[Path, list[int]]] = {}

    def get(name: str) -> tuple[Path, list[int]]:
        if name not in made:
            model_dir = make_variant(tmp_path_factory.mktemp("sensitivity"), name)
            made[name] = model_dir, greedy(model_dir, [PROMPT], NUM_TOKENS)[0]
        return made[name]

    return get


def tensor_class(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def without(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a model computes with that has forgotten the tensor: norms by one, all else by zero."""
    return torch.ones_like(tensor) if tensor_name.endswith("norm.weight") else torch.zeros_like(tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_class_matters(variant: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model_dir, answer = checkpoint(variant)
    files = {path.name: load_file(path) for path in sorted(model_dir.glob("*.safetensors"))}
    classes = {tensor_class(name) for tensors in files.values() for name in tensors}
    assert len(classes) >= 11
    for dropped in sorted(classes):
        altered = shutil.copytree(model_dir, tmp_path / "altered", dirs_exist_ok=True)
        for file_name, tensors in files.items():
            kept = {
                name: without(name, tensor) if tensor_class(name) == dropped else tensor
                for name, tensor in tensors.items()
            }
            save_file(kept, altered / file_name)
        assert greedy(altered, [PROMPT], NUM_TOKENS) != [answer], f"{dropped} does not matter"


@pytest.mark.parametrize("variant", SCALED)
def test_rope_scaling_matters(variant: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model_dir, answer = checkpoint(variant)
    altered = shutil.copytree(model_dir, tmp_path / "altered")
    config = json.loads((altered / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (altered / "config.json").write_text(json.dumps(config))
    assert greedy(altered, [PROMPT], NUM_TOKENS) != [answer]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plane", [0, 1], ids=["keys", "values"])
def test_one_kv_block_matters(variant: str, plane: int, checkpoint: Checkpoint) -> None:
    model_dir, answer = checkpoint(variant)
    rig = ModelRig(load_model(str(model_dir), "float32", "cpu"))
    sequence = rig.add(PROMPT, NUM_TOKENS)
    rig.step([sequence])
    rig.pool[sequence.block_table[1], :, plane] = torch.randn(
        rig.pool[0, :, plane].shape, generator=torch.Generator().manual_seed(0)
    )
    rig.generate([sequence], NUM_TOKENS)
    assert sequence.generated != answer
