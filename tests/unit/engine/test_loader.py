"""Loading: shards, dtypes, what does not fit, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, make_variant
from model_rig import greedy
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from vl_checkpoints import make_qwen_vl

from kvrelay_core.errors import ConfigError
from kvrelay_engine import loader
from kvrelay_engine.loader import load_model
from kvrelay_engine.sizing import GIB, MemoryShare, check_fits, free_bytes, total_bytes
from kvrelay_transfer.layout import KvLayout

PROMPT = [3, 1, 4, 1, 5, 9]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_variant(tmp_path_factory.mktemp("loader"), "qwen3")


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(model_dir, tmp_path / "copy")


def alter(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def alter_config(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def fingerprint(directory: Path, dtype: str = "float32", max_model_len: int | None = None) -> bytes:
    return load_model(str(directory), dtype, "cpu", max_model_len=max_model_len).fingerprint


# ------------------------------------------------------------------------------------------------ weights


def test_shards_are_the_same_model_as_one_file(tmp_path: Path) -> None:
    one = make_checkpoint(tmp_path / "one", "llama", seed=5)
    several = make_checkpoint(tmp_path / "several", "llama", seed=5, shards=4)
    assert len(list(several.glob("*.safetensors"))) >= 4
    assert greedy(one, [PROMPT], 16) == greedy(several, [PROMPT], 16)


def test_missing_unexpected_and_wrong_tensors_are_named_together(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_norm.weight"]
        tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(3)
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(64, dtype=torch.int32)

    alter(copy, spoil)
    with pytest.raises(ConfigError) as caught:
        load_model(str(copy), "auto", "cpu")
    message = caught.value.message
    assert "missing: model.layers.1.self_attn.k_norm.weight;" in message
    assert "model.norm.weight has shape [3], config.json says [64]" in message
    assert "model.layers.0.input_layernorm.weight is I32" in message
    assert "unexpected: model.layers.0.mlp.router.weight" in message


def test_layers_beyond_the_config_are_unexpected(copy: Path) -> None:
    alter_config(copy, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"unexpected: model\.layers\.1\..* and 3 more"):
        load_model(str(copy), "auto", "cpu")


def test_biases_that_the_config_does_not_know_are_unexpected(tmp_path: Path) -> None:
    biased = make_checkpoint(tmp_path / "biased", "llama", attention_bias=True)
    alter_config(biased, attention_bias=False)
    with pytest.raises(ConfigError, match=r"unexpected: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_model(str(biased), "auto", "cpu")


def test_tensors_without_meaning_are_passed_over(copy: Path) -> None:
    before = greedy(copy, [PROMPT], 8)
    alter(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    assert greedy(copy, [PROMPT], 8) == before


def test_a_tied_model_ignores_an_output_projection(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", "qwen2", tie_embeddings=True)
    before = greedy(tied, [PROMPT], 8)
    alter(tied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(384, 64)}))
    assert greedy(tied, [PROMPT], 8) == before


def test_the_tower_of_a_vision_language_model_is_not_there_and_all_else_is_checked(tmp_path: Path) -> None:
    model_dir = make_qwen_vl(tmp_path / "qwen_vl")
    before = load_model(str(model_dir), "float32", "cpu")
    alter(model_dir, lambda tensors: tensors.update({"visual.unheard_of": torch.zeros(1000, 1000)}))
    after = load_model(str(model_dir), "float32", "cpu")
    assert after.weight_bytes == before.weight_bytes
    alter(model_dir, lambda tensors: tensors.update({"visuals.weight": torch.zeros(2), "audio.w": torch.zeros(2)}))
    with pytest.raises(ConfigError, match=r"unexpected: audio\.w, visuals\.weight$"):
        load_model(str(model_dir), "float32", "cpu")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(str(copy), "auto", "cpu")


def test_truncated_file(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"not a readable safetensors file.*download it again"):
        load_model(str(copy), "auto", "cpu")


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, "not in .*: model-1.safetensors"),
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside its directory"),
        ({"weight_map": {}}, "names no file"),
        ({"weights": {}}, "not a safetensors index"),
    ],
)
def test_bad_index(copy: Path, index: object, named: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=named):
        load_model(str(copy), "auto", "cpu")


# ----------------------------------------------------------------------------- dtype, device, length, memory


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    half = make_checkpoint(tmp_path / "half", "llama", dtype=torch.bfloat16)
    assert load_model(str(half), "auto", "cpu").dtype == "bfloat16"
    assert load_model(str(half), "float32", "cpu").dtype == "float32"
    assert load_model(str(half), "auto", "cpu").kv_layouts(64, 64)[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "device", "named"),
    [
        ("int8", "cpu", "dtype 'int8' is not supported; supported are auto, float32"),
        ("auto", "abacus", "device 'abacus' is not known"),
        ("auto", "mps", "device 'mps' is not supported"),
        ("auto", "cuda:99", "device 'cuda:99' is not there"),
    ],
)
def test_bad_dtype_or_device(model_dir: Path, dtype: str, device: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_model(str(model_dir), dtype, device)


@pytest.mark.parametrize("max_model_len", [0, -1, 4097])
def test_max_model_len_out_of_range(model_dir: Path, max_model_len: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and the model's own limit of 4096"):
        load_model(str(model_dir), "auto", "cpu", max_model_len=max_model_len)


def test_max_model_len(model_dir: Path) -> None:
    assert load_model(str(model_dir), "auto", "cpu").config.max_model_len == 4096
    assert load_model(str(model_dir), "auto", "cpu", max_model_len=128).config.max_model_len == 128


def test_a_model_that_does_not_fit_says_how_much_is_missing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: 1024)
    with pytest.raises(
        ConfigError, match=r"the model .* in float32 on cpu needs 0\.00 GiB but only 0\.00 GiB are free"
    ):
        load_model(str(model_dir), "auto", "cpu")


def test_check_fits() -> None:
    check_fits(GIB, GIB, "it")
    with pytest.raises(ConfigError, match=r"it needs 16.00 GiB but only 12.50 GiB are free: 3.50 GiB are missing"):
        check_fits(16 * GIB, 12 * GIB + GIB // 2, "it")


def test_a_share_of_memory_is_for_weights_activations_and_pool() -> None:
    layout = KvLayout("float32", num_layers=2, num_kv_heads=4, block_tokens=64, head_dim=16)
    block = layout.block_bytes
    share = MemoryShare(fraction=0.5, total=40 * block, weights=9 * block, activations=block // 2)
    assert share.blocks_of(layout) == 10
    assert replace(share, weights=18 * block - block // 2).blocks_of(layout) == 2


def test_a_share_that_leaves_nothing_is_refused_in_numbers() -> None:
    layout = KvLayout("float32", num_layers=2, num_kv_heads=4, block_tokens=64, head_dim=16)
    share = MemoryShare(fraction=0.25, total=16 * GIB, weights=4 * GIB, activations=GIB // 2)
    with pytest.raises(
        ConfigError,
        match=r"memory_fraction 0\.25 of 16\.00 GiB is 4\.00 GiB; the weights take 4\.00 GiB, .*activations 0\.50 GiB"
        r".*raise --memory-fraction",
    ):
        share.blocks_of(layout)


def test_what_is_on_the_device_is_accounted_for(model_dir: Path) -> None:
    loaded = load_model(str(model_dir), "auto", "cpu")
    on_disk = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    assert 0.9 * on_disk < loaded.weight_bytes - 4096 * loaded.config.head_dim * 4 <= on_disk
    one, two = (loaded.config.activation_bytes(tokens, 8, 4) for tokens in (256, 512))
    assert 0 < one < two < 2 * one


def test_memory_of_the_host() -> None:
    device = torch.device("cpu")
    assert 0 < free_bytes(device) <= total_bytes(device) < 2**50


# -------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_the_content(model_dir: Path, copy: Path) -> None:
    alter_config(copy, _name_or_path="elsewhere", transformers_version="0.0", max_position_embeddings=8192)
    assert len(fingerprint(model_dir)) == 32
    assert fingerprint(model_dir) == fingerprint(copy) == fingerprint(copy, max_model_len=100)


def test_fingerprint_changes_with_one_weight(model_dir: Path, copy: Path) -> None:
    alter(copy, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert fingerprint(copy) != fingerprint(model_dir)


def test_fingerprint_changes_with_the_maths(model_dir: Path, copy: Path) -> None:
    before = fingerprint(model_dir)
    assert fingerprint(model_dir, "bfloat16") != before
    alter_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 20_000.0})
    assert fingerprint(copy) != before
    alter_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, rms_norm_eps=1e-4)
    assert fingerprint(copy) != before
    alter_config(copy, rms_norm_eps=1e-5)
    assert fingerprint(copy) == before
