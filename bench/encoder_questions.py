"""What is asked in the benchmark of images: a random checkpoint, and prompts that share nothing unless they are to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from checkpoint_tokenizer import media_token_id
from msgspec import Struct
from vision_checkpoints import QWEN_TOKENS, VOCAB_SIZE, as_bytes, draw_picture, make_qwen2_5_vl

IMAGE_SIDE = 224  # pixels: 16 x 16 patches, 64 tokens
PATCHES_PER_IMAGE = 256
TOKENS_PER_IMAGE = 64
TEXT_TOKENS = 64
START, PAD, _, END = (media_token_id(token, QWEN_TOKENS, VOCAB_SIZE) for token in QWEN_TOKENS)
# 22 M parameters of text, 10 M of the tower; the real ones' ratio of work an image is nearer to 1 to 1 as well.
TEXT: dict[str, Any] = {
    "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 8, "hidden_size": 320, "intermediate_size": 864, "num_heads": 5, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [3, 7], "out_hidden_size": 512,
}  # fmt: skip


class Question(Struct, frozen=True):
    token_ids: list[int]  # one placeholder for a picture
    pictures: list[bytes]


class Questions:
    """An endless supply of new ones."""

    def __init__(self, seed: int, side: int = IMAGE_SIDE, file_format: str = "PNG") -> None:
        """`side` of a picture, in pixels."""
        self._random = random.Random(seed)
        self._side, self._format = side, file_format

    def text(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(250) for _ in range(num_tokens)]

    def picture(self) -> bytes:
        drawn = draw_picture(self._side, self._side, seed=self._random.randrange(1 << 31))
        return as_bytes(drawn, self._format)

    def with_pictures(self, pictures: list[bytes]) -> Question:
        """Half of the text before them, half behind."""
        images = [token for _ in pictures for token in (START, PAD, END)]
        return Question([*self.text(TEXT_TOKENS // 2), *images, *self.text(TEXT_TOKENS // 2)], pictures)

    def new(self, num_images: int) -> Question:
        return self.with_pictures([self.picture() for _ in range(num_images)])


def make_model(directory: Path) -> Path:
    side = IMAGE_SIDE * IMAGE_SIDE
    processor = {"patch_size": VISION["patch_size"], "min_pixels": side, "max_pixels": side}
    return make_qwen2_5_vl(directory, text=TEXT, vision=VISION, processor=processor)
