"""Loads the image side of a checkpoint: tower, processor, and the fingerprint of what they compute.

Only the tower's tensors are read. It knows nothing of the text model but its hidden size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import msgspec
import torch
from blake3 import blake3

from kvrelay_core.checkpoint import resolve_model
from kvrelay_core.errors import ConfigError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import read_processor_config
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.loader import DTYPES, choose_dtype, find_device
from kvrelay_engine.models.dense_config import read_dtype
from kvrelay_engine.sizing import check_fits, free_bytes
from kvrelay_engine.vision.image_input import ImageProcessor, VisionTower
from kvrelay_engine.vision.registry import find_family
from kvrelay_engine.weight_reader import WeightReader


@dataclass(frozen=True, slots=True)
class LoadedTower:
    model_type: str
    tower: VisionTower
    processor: ImageProcessor
    hidden_size: int  # of the embeddings: the text model's
    dtype: str  # that it computes in
    device: torch.device
    fingerprint: bytes
    weight_bytes: int  # on the device


def load_tower(model: str, dtype: str, device: str, limits: MediaLimits | None = None) -> LoadedTower:
    """Loads from a local directory or a hub id. Beyond `limits` (None: the defaults) no picture is decoded.

    `dtype` is float32, bfloat16, float16 or auto (the checkpoint's). Raises ConfigError for whatever cannot work:
    the checkpoint, a model without a supported image side, the device, its memory.
    """
    directory = resolve_model(model)
    fields = ConfigFields.read(directory / "config.json")
    family = find_family(fields)
    config = family.read_config(fields)
    processor_config = read_processor_config(directory)
    if processor_config is None:
        raise ConfigError(f"{directory} has no preprocessor_config.json; without it no image can be prepared")
    processor = family.make_processor(processor_config, config, limits or MediaLimits())
    dtype, torch_device = choose_dtype(dtype, read_dtype(fields)), find_device(device)
    with torch.inference_mode(), WeightReader(directory, DTYPES[dtype], torch_device) as reader:
        reader.keep_only(family.prefixes)
        weight_bytes = reader.size_bytes
        check_fits(weight_bytes, free_bytes(torch_device), f"the image side of {model} in {dtype} on {device}")
        weights = family.read_weights(reader, config)
        reader.check_complete()
        tower = family.build(config, weights)
        parts = (family.model_type, dtype, asdict(config), processor_config)
        fingerprint = _fingerprint(reader, parts)
    return LoadedTower(
        model_type=family.model_type,
        tower=tower,
        processor=processor,
        hidden_size=config.output_size,
        dtype=dtype,
        device=torch_device,
        fingerprint=fingerprint,
        weight_bytes=weight_bytes,
    )


def _fingerprint(reader: WeightReader, parts: tuple[object, ...]) -> bytes:
    """BLAKE3 over the tower's tensors as stored and all else that changes its embeddings: never a path.

    Which file of the checkpoint a tensor lies in, and the text model's tensors, do not matter.
    """
    digest = blake3(b"kvrelay.tower.v1", max_threads=blake3.AUTO)
    digest.update(msgspec.json.encode(parts, order="deterministic"))
    for name in reader.names:
        tensor = reader.stored(name)
        digest.update(msgspec.json.encode((name, str(tensor.dtype), list(tensor.shape))))
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
