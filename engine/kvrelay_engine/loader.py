"""Loads a model: config.json, weights, and the fingerprint that tells other workers what is served here.

It knows nothing of KV pools or of the network; `resolve_model` finds the directory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blake3 import blake3

from kvrelay_core.checkpoint import resolve_model
from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.decoder import Decoder
from kvrelay_engine.models.layers.linear import MakeLinear, linear_for_tokens
from kvrelay_engine.models.registry import find_architecture
from kvrelay_engine.sizing import check_fits, free_bytes
from kvrelay_engine.weight_reader import WeightReader
from kvrelay_transfer.layout import KvLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: ModelConfig
    model: Decoder
    dtype: str  # that it computes in
    device: torch.device
    fingerprint: bytes
    weight_bytes: int  # on the device

    def kv_layouts(self, block_tokens: int, hash_unit_tokens: int) -> tuple[KvLayout, ...]:
        """Of the pools that this model runs on, one for each of its KV groups: the layers that see the whole context,
        then those with a window. Where all layers have a window they are one group without one."""
        window = self.config.local.window if len(self.config.kv_groups) > 1 and self.config.local else 0
        layouts = tuple(
            KvLayout(
                dtype=self.dtype,
                num_layers=len(layers),
                num_kv_heads=self.config.num_kv_heads,
                block_tokens=block_tokens,
                head_dim=self.config.head_dim,
                hash_unit_tokens=hash_unit_tokens,
                window=window if group else 0,
            )
            for group, layers in enumerate(self.config.kv_groups)
        )
        for layout in layouts:
            layout.validate()
        return layouts


def read_config(model_dir: Path) -> ModelConfig:
    """Raises ConfigError naming the field that is missing, malformed or not supported."""
    fields = ConfigFields.read(model_dir / "config.json")
    return find_architecture(fields).read_config(fields)


def load_model(
    model: str,
    dtype: str,
    device: str,
    *,
    max_model_len: int | None = None,
    make_linear: MakeLinear = linear_for_tokens,
) -> LoadedModel:
    """Loads a local directory or a hub id.

    `dtype` is float32, bfloat16, float16 or auto (the checkpoint's). `max_model_len` bounds the positions, at most
    the model's own. `make_linear` gives the weights the form that suits the number of tokens in a step. Raises
    ConfigError for whatever cannot work: the checkpoint, the device, its memory.
    """
    directory = resolve_model(model)
    fields = ConfigFields.read(directory / "config.json")
    architecture = find_architecture(fields)
    config = _limit_length(architecture.read_config(fields), max_model_len)
    dtype = choose_dtype(dtype, config.dtype)
    torch_device = find_device(device)
    with (
        torch.inference_mode(),
        WeightReader(directory, DTYPES[dtype], torch_device, foreign_prefixes=architecture.vision_prefixes) as reader,
    ):
        check_fits(reader.size_bytes, free_bytes(torch_device), f"the model {model} in {dtype} on {device}")
        weights = architecture.read_weights(reader, config)
        reader.check_complete()
        decoder = architecture.build(config, weights, make_linear)
        weight_bytes = reader.size_bytes + decoder.copied_bytes + decoder.table_bytes
    fingerprint = _fingerprint(reader.files, config, dtype)
    return LoadedModel(config, decoder, dtype, torch_device, fingerprint, weight_bytes)


def _limit_length(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    if max_model_len is None:
        return config
    if not 1 <= max_model_len <= config.max_model_len:
        raise ConfigError(
            f"max_model_len {max_model_len} must be between 1 and the model's own limit of {config.max_model_len}"
        )
    return replace(config, max_model_len=max_model_len)


def choose_dtype(dtype: str, checkpoint_dtype: str) -> str:
    """`auto` is the checkpoint's own. Raises ConfigError where it is not supported."""
    if dtype == "auto":
        return checkpoint_dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; supported are auto, {', '.join(DTYPES)}")
    return dtype


def find_device(device: str) -> torch.device:
    """Raises ConfigError where the device is not known, not supported or not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if found.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (found.index or 0) >= num_devices:
            raise ConfigError(f"device {device!r} is not there: torch {torch.__version__} sees {num_devices} GPUs")
    return found


def _fingerprint(files: list[Path], config: ModelConfig, dtype: str) -> bytes:
    """BLAKE3 over the content of the weights and all else that changes what is computed: never a path or a name."""
    digest = blake3(b"kvrelay.model.v1")
    for path in files:
        digest.update(blake3(max_threads=blake3.AUTO).update_mmap(path).digest())
    digest.update(config.maths_fingerprint_fields())
    digest.update(dtype.encode())
    return digest.digest()
