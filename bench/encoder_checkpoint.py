"""A random checkpoint with Qwen2.5-VL-7B's tower, and its text model's width in fewer layers, drawn on a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vision_checkpoints import make_qwen2_5_vl

TEXT: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
}  # fmt: skip


def make_wide_model(directory: Path, side: int, device: torch.device) -> Path:
    """bfloat16, 3.3 GB. Pictures of `side` x `side` pixels are taken as they are."""
    import transformers

    processor = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": side * side}
    make_qwen2_5_vl(directory, processor=processor)  # a small one, for the files around the tensors
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config["text_config"] |= {
        **TEXT,
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * TEXT["num_hidden_layers"],
    }
    config["vision_config"] |= {**VISION, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig.from_pretrained(directory)
        )
    generator = torch.Generator(device).manual_seed(0)
    tensors = {name: _draw(tensor.shape, generator) for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def _draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Scaled by what goes in; norms and biases are near 1 and 0."""
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    scaled = drawn / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * drawn
    return scaled.to(torch.bfloat16).cpu()
