"""The small files of checkpoints of models that see: what the router and transformers' processors read of them.

No weights. Token ids of text are bytes; the special tokens come behind them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

NUM_BYTES = 256
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GEMMA_TOKENS = (
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<end_of_image>",
)  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class QwenImagesOnly(Qwen2_5_VLProcessor):  # type: ignore[misc]  # transformers has no types
    """Its video processor needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def qwen_id(token: str) -> int:
    return NUM_BYTES + QWEN_TOKENS.index(token)


def gemma_id(token: str) -> int:
    return NUM_BYTES + GEMMA_TOKENS.index(token)


def write_qwen(folder: Path, **image_settings: Any) -> Qwen2_5_VLProcessor:
    """Returns the reference processor."""
    config = {
        "model_type": "qwen2_5_vl",
        "image_token_id": qwen_id("<|image_pad|>"),
        "video_token_id": qwen_id("<|video_pad|>"),
        "eos_token_id": qwen_id("<|im_end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(QWEN_TOKENS), eos_token="<|im_end|>", pad_token="<|im_end|>",
        extra_special_tokens=named,
    )  # fmt: skip
    image = Qwen2VLImageProcessorPil(**image_settings)
    processor = QwenImagesOnly(image, tokenizer, chat_template=QWEN_TEMPLATE)
    processor.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(image_settings))
    return processor


def write_gemma(folder: Path, view_tokens: int = 4, **image_settings: Any) -> Gemma3Processor:
    """Returns the reference processor."""
    config = {
        "model_type": "gemma3",
        "boi_token_index": gemma_id("<start_of_image>"),
        "image_token_index": gemma_id("<image_soft_token>"),
        "eoi_token_index": gemma_id("<end_of_image>"),
        "eos_token_id": gemma_id("<eos>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    named = {
        "boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>",
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(GEMMA_TOKENS, begin="<bos>"), bos_token="<bos>", eos_token="<eos>",
        pad_token="<eos>", extra_special_tokens=named,
    )  # fmt: skip
    image = Gemma3ImageProcessorPil(**image_settings)
    processor = Gemma3Processor(image, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=view_tokens)
    processor.save_pretrained(folder)
    return processor


def encode_image(width: int, height: int, form: str = "PNG", color: str = "red", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, form, **options)
    return out.getvalue()


def _tokenizer(special: tuple[str, ...], begin: str = "") -> Tokenizer:
    """Bytes, and one merge: two line ends in a row are one token, as in the vocabularies of real models."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {token: NUM_BYTES + i for i, token in enumerate(special)}
    vocabulary["ĊĊ"] = NUM_BYTES + len(special)  # the byte-level form of the line end, twice
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begin:
        begin_id = NUM_BYTES + special.index(begin)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, begin_id)]
        )
    return tokenizer
