"""Whole random vision-language checkpoints: both sides' weights, processor and tokenizer, and pictures to show them.

Every parameter is drawn, also those that initialization leaves constant or zero (norms, biases, Gemma's projector):
otherwise a tower that forgets one, or takes another picture, gives the same embeddings. The same arguments give the
same checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    END_OF_TURN,
    media_token_id,
    special_token_id,
    write_tokenizer,
)
from checkpoints import draw_parameters, quiet_transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from vl_checkpoints import draw_gemma, draw_tower

VOCAB_SIZE = 384
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
_PARTS_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_of_role|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end_of_turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant\n{% endif %}"
)
GEMMA_TOKENS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
QWEN_TEMPLATE = _PARTS_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
GEMMA_TEMPLATE = _PARTS_TEMPLATE.replace("IMAGE", "<start_of_image>").replace("VIDEO", "")
_TEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "bos_token_id": special_token_id(BEGIN_OF_TEXT, VOCAB_SIZE),
    "eos_token_id": special_token_id(END_OF_TEXT, VOCAB_SIZE),
}
# Windows of 2 x 2 embeddings, and full attention in the middle layer.
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}
# 8 x 8 patches; 2 x 2 of them make an embedding.
_GEMMA_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "vision_use_head": False,
}


def make_qwen2_5_vl(
    directory: Path,
    *,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
) -> Path:
    """Writes a Qwen2.5-VL checkpoint; a picture is at most 64 x 64 pixels to it, i.e. 64 embeddings.

    `text`, `vision` and `processor` are fields of the configurations that differ from this small one.
    """
    import transformers

    ids = {token: media_token_id(token, QWEN_TOKENS, VOCAB_SIZE) for token in QWEN_TOKENS}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    with quiet_transformers():
        config = transformers.Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope, **(text or {})},
            vision_config={**_QWEN_VISION, **(vision or {})},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        draw_parameters(model, seed)
        draw_tower(model.model.visual, seed)
        model.save_pretrained(directory)
    processor_fields = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 16 * 16,
        "max_pixels": 64 * 64,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **(processor or {}),
    }
    _write_rest(directory, processor_fields, QWEN_TOKENS, QWEN_TEMPLATE)
    return directory


def make_gemma3(directory: Path, *, seed: int = 0, pan_and_scan: bool = False) -> Path:
    """Writes a Gemma 3 checkpoint: 16 embeddings a view; with `pan_and_scan` up to 3 crops of 16 pixels or more."""
    import transformers

    boi, image, eoi = (media_token_id(token, GEMMA_TOKENS, VOCAB_SIZE) for token in GEMMA_TOKENS)
    text = {**_TEXT, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    with quiet_transformers():
        config = transformers.Gemma3Config(
            text_config={**text, "layer_types": layer_types},
            vision_config=dict(_GEMMA_VISION),
            mm_tokens_per_image=16,
            boi_token_index=boi,
            image_token_index=image,
            eoi_token_index=eoi,
        )
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
        draw_gemma(model, seed)
        draw_tower(model.model.vision_tower, seed)
        draw_tower(model.model.multi_modal_projector, seed)
        model.save_pretrained(directory)
    processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_seq_length": 16,
        "do_convert_rgb": None,
        "do_pan_and_scan": True if pan_and_scan else None,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 3,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    _write_rest(directory, processor, GEMMA_TOKENS, GEMMA_TEMPLATE)
    return directory


def _write_rest(directory: Path, processor: dict[str, Any], media_tokens: tuple[str, ...], template: str) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    generation = {
        "bos_token_id": special_token_id(BEGIN_OF_TEXT, VOCAB_SIZE),
        "eos_token_id": [special_token_id(token, VOCAB_SIZE) for token in (END_OF_TEXT, END_OF_TURN)],
        "pad_token_id": special_token_id(END_OF_TEXT, VOCAB_SIZE),
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    write_tokenizer(directory, VOCAB_SIZE, adds_begin_of_text=False, media_tokens=media_tokens, chat_template=template)


# ------------------------------------------------------------------------------------------------ alterations


def alter_tensors(model_dir: Path, alter: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Puts another tensor in the place of each."""
    path = model_dir / "model.safetensors"
    save_file({name: alter(name, tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def alter_json(path: Path, **fields: object) -> None:
    """Sets fields of a JSON file; `vision_config` and other sections are replaced whole."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# --------------------------------------------------------------------------------------------------- pictures


def draw_picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise over slopes: all frequencies, and no two places alike."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 128, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
    pixels = slope + rng.integers(0, 64, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def as_bytes(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()
