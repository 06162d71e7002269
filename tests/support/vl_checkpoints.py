"""Random vision-language checkpoints, prompts with images, and what `transformers` answers to them.

An image here is random patches, not a picture: what the tower makes of them is taken from `transformers`' own tower,
as embeddings. So these tests are of the text side alone. Every parameter is drawn (see `checkpoints`), also those that
initialization leaves constant or zero.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import draw_parameters, quiet_transformers
from model_rig import PlacedImage
from safetensors.torch import load_file, save_file

VOCAB_SIZE = 384
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN = 380, 381, 382, 383

Grid = tuple[int, int, int]
# Text of so many tokens, or an image with such a grid of patches.
Layout = Sequence[int | Grid]

_QWEN_TEXT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}
_GEMMA_TEXT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# 8 x 8 patches, pooled to 16 tokens: as many as a grid of (1, 8, 8) makes for Qwen.
_GEMMA_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "vision_use_head": False,
}
GEMMA_IMAGE: Grid = (1, 8, 8)


@dataclass
class Question:
    """A prompt whose images are embeddings already, and what `transformers` needs to answer it."""

    prompt: list[int]
    images: list[PlacedImage] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # of `generate`, beside the prompt


def make_qwen_vl(
    directory: Path,
    *,
    seed: int = 0,
    tie_embeddings: bool = False,
    rope_scaling: dict[str, Any] | None = None,
) -> Path:
    """Writes a Qwen2.5-VL checkpoint as transformers 5 does: nested config, short tensor names."""
    import transformers

    # A small base: the slowest dimensions, those of the width, must tell one patch from the next.
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3], **(rope_scaling or {})}
    with quiet_transformers():
        config = transformers.Qwen2_5_VLConfig(
            text_config={**_QWEN_TEXT, "rope_parameters": rope},
            vision_config=dict(_QWEN_VISION),
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            vision_start_token_id=START_TOKEN,
            vision_end_token_id=END_TOKEN,
            tie_word_embeddings=tie_embeddings,
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        draw_parameters(model, seed)
        draw_tower(model.model.visual, seed)
        model.save_pretrained(directory)
    return directory


def make_gemma(
    directory: Path,
    *,
    seed: int = 0,
    text_only: bool = False,
    window: int = 24,
    layer_types: str = "llgl",
    tie_embeddings: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    **text_fields: Any,
) -> Path:
    """Writes a Gemma 3 checkpoint as transformers 5 does; `layer_types` has l for local and g for global layers."""
    import transformers

    text = {
        **_GEMMA_TEXT,
        "num_hidden_layers": len(layer_types),
        "layer_types": [{"l": "sliding_attention", "g": "full_attention"}[kind] for kind in layer_types],
        "sliding_window": window,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0, **(rope_scaling or {})},
        },
        "tie_word_embeddings": tie_embeddings,
        **text_fields,
    }
    with quiet_transformers():
        model: Any
        if text_only:
            model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text)).eval()
            draw_gemma(model, seed)
        else:
            config = transformers.Gemma3Config(
                text_config=text,
                vision_config=dict(_GEMMA_VISION),
                mm_tokens_per_image=16,
                image_token_index=IMAGE_TOKEN,
                boi_token_index=START_TOKEN,
                eoi_token_index=END_TOKEN,
                tie_word_embeddings=tie_embeddings,
            )
            model = transformers.Gemma3ForConditionalGeneration(config).eval()
            draw_gemma(model, seed)
            draw_tower(model.model.vision_tower, seed)
            draw_tower(model.model.multi_modal_projector, seed)
        model.save_pretrained(directory)
    return directory


def draw_gemma(model: Any, seed: int) -> None:
    """As `draw_parameters`; but a norm multiplies by one plus its weight, and embeddings are scaled up."""
    draw_parameters(model, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.0, 1.5, generator=generator)
            elif ".post_" in name:
                parameter.uniform_(0.5, 2.0, generator=generator)  # layers outweigh the embedding in the residual
            elif name.endswith("norm.weight"):
                parameter.uniform_(-0.5, 0.5, generator=generator)
            elif name.endswith("embed_tokens.weight"):
                parameter.mul_(0.4)


def draw_tower(tower: Any, seed: int) -> None:
    """Scaled by what goes in, so that embeddings of media are as large as those of text, and all parameters matter."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sorted(tower.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 / math.sqrt(math.prod(parameter.shape[1:])), generator=generator)


def rename_tensors(model_dir: Path, rename: Callable[[str], str]) -> None:
    """Gives the tensors of a checkpoint the names that another writer has for them."""
    path = model_dir / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


def flatten_config(model_dir: Path) -> None:
    """Writes a Qwen2.5-VL config.json as the published files have it: text fields among the others."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["torch_dtype"] = config.pop("dtype")
    for name in ("layer_types", "model_type"):
        text.pop(name, None)
    path.write_text(json.dumps({**text, **config}, indent=2))


# ---------------------------------------------------------------------------------------------- reference


def lay_out(layout: Layout, seed: int) -> tuple[list[int], list[int], list[Grid]]:
    """The prompt, and where its images are, and their grids."""
    text = random.Random(seed)
    prompt: list[int] = []
    offsets, grids = [], []
    for part in layout:
        if isinstance(part, int):
            prompt += [text.randrange(IMAGE_TOKEN) for _ in range(part)]
            continue
        offsets.append(len(prompt))
        grids.append(part)
        prompt += [IMAGE_TOKEN] * (math.prod(part) // 4)
    return prompt, offsets, grids


def token_types(prompt: list[int]) -> torch.Tensor:
    return torch.tensor([[int(token == IMAGE_TOKEN) for token in prompt]], dtype=torch.int32)


class QwenReference:
    """`transformers`' model in float32 on the CPU."""

    def __init__(self, model_dir: Path) -> None:
        import transformers

        with quiet_transformers():
            self.model: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                model_dir, dtype=torch.float32
            ).eval()

    def question(self, layout: Layout, seed: int) -> Question:
        generator = torch.Generator().manual_seed(seed)
        prompt, offsets, grids = lay_out(layout, seed)
        if not grids:
            return Question(prompt)
        pixels = torch.randn(sum(map(math.prod, grids)), 3 * 2 * 4 * 4, generator=generator)
        grid_thw = torch.tensor(grids)
        with torch.inference_mode():
            rows = self.model.get_image_features(pixels, grid_thw).pooler_output
        images = [PlacedImage(*item) for item in zip(offsets, rows, grids, strict=True)]
        inputs = {"pixel_values": pixels, "image_grid_thw": grid_thw, "mm_token_type_ids": token_types(prompt)}
        return Question(prompt, images, inputs)


class GemmaReference:
    """`transformers`' model in float32 on the CPU."""

    def __init__(self, model_dir: Path, *, text_only: bool = False) -> None:
        import transformers

        classes: Any = transformers
        loaded_class = classes.Gemma3ForCausalLM if text_only else classes.Gemma3ForConditionalGeneration
        with quiet_transformers():
            self.model: Any = loaded_class.from_pretrained(model_dir, dtype=torch.float32).eval()

    def question(self, layout: Layout, seed: int) -> Question:
        """Every image of the layout is a `GEMMA_IMAGE`."""
        generator = torch.Generator().manual_seed(seed)
        prompt, offsets, grids = lay_out(layout, seed)
        if not grids:
            return Question(prompt)
        pixels = torch.randn(len(grids), 3, 32, 32, generator=generator)
        with torch.inference_mode():
            rows = self.model.get_image_features(pixels).pooler_output
        images = [PlacedImage(*item) for item in zip(offsets, rows, strict=True)]
        return Question(prompt, images, {"pixel_values": pixels, "token_type_ids": token_types(prompt)})


def reference_answer(reference: Any, question: Question, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by `generate`, and the logits that each was the best of: float32 [num_tokens, V]."""
    ids = torch.tensor([question.prompt])
    reference.model.generation_config.eos_token_id = None
    with quiet_transformers(), torch.inference_mode():
        answer = reference.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **question.inputs,
        )
    tokens: list[int] = answer.sequences[0, len(question.prompt) :].tolist()
    assert len(tokens) == num_tokens
    return tokens, torch.cat(answer.logits)


def decisive_question(
    reference: Any, layout: Layout, num_tokens: int, min_margin: float
) -> tuple[Question, list[int], torch.Tensor]:
    """A question whose answer does not hang on rounding, and the answer."""
    for seed in range(20):
        question = reference.question(layout, seed)
        tokens, logits = reference_answer(reference, question, num_tokens)
        best_two = logits.topk(2).values
        if (best_two[:, 0] - best_two[:, 1]).min().item() >= min_margin:
            return question, tokens, logits
    raise AssertionError(f"no prompt laid out as {layout} has a decisive answer")
