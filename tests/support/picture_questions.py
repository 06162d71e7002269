"""Questions about pictures whose answer is known before any worker has seen the picture.

A picture has a twin: the same pixels in other bytes, so that no cache has anything of the one because of the other.
What the cluster answers about the twin, undisturbed, it has to answer about the picture, whatever happens meanwhile.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from answers import Answer, ask
from checkpoint_tokenizer import media_token_id
from fault_scene import cell_salt
from vision_checkpoints import QWEN_TOKENS, VOCAB_SIZE, as_bytes, draw_picture

from kvrelay_client import AsyncClient, Client
from kvrelay_core.errors import KvRelayError

START, PAD, VIDEO_PAD, END = (media_token_id(token, QWEN_TOKENS, VOCAB_SIZE) for token in QWEN_TOKENS)
NUM_TOKENS = 8
MIN_MARGIN = 1e-3  # between the best two logarithms of every token: far above what rounding does
SIZE = (64, 64)
NUM_ROWS = 64  # of a picture's embedding
_seeds = itertools.count()


@dataclass(frozen=True, slots=True)
class PictureQuestion:
    prompt: list[int]  # one placeholder stands for a picture
    pictures: list[bytes]
    answer: list[int]

    def options(self, pictures: Sequence[bytes] | None = None) -> dict[str, Any]:
        return {
            "token_ids": self.prompt, "media": list(pictures or self.pictures), "max_tokens": NUM_TOKENS,
            "temperature": 0, "ignore_eos": True, "cache_salt": cell_salt(),
        }  # fmt: skip


def new_prompt(seed: int, num_pictures: int) -> list[int]:
    generator = random.Random(seed)
    text = [[generator.randrange(250) for _ in range(7)] for _ in range(num_pictures + 1)]
    return [*text[0], *(token for part in text[1:] for token in (START, PAD, END, *part))]


def new_question(target: str, num_pictures: int = 1) -> PictureQuestion:
    """About pictures that nobody has seen; rounding does not decide its answer."""
    with Client(target) as client:
        for seed in itertools.islice(_seeds, 20):
            drawn = [draw_picture(*SIZE, seed=100 * seed + index) for index in range(num_pictures)]
            question = PictureQuestion(new_prompt(seed, num_pictures), [as_bytes(one) for one in drawn], [])
            twins = [as_bytes(one, compress_level=1) for one in drawn]
            assert not set(twins) & set(question.pictures)
            told = client.complete(**question.options(twins), logprobs=2, timeout_s=30)
            margins = [entry.top[0][1] - entry.top[1][1] for entry in told.logprobs]
            if min(margins) >= MIN_MARGIN:
                return PictureQuestion(question.prompt, question.pictures, list(told.token_ids))
    raise AssertionError("no decisive question found")


async def answer_or_error(client: AsyncClient, question: PictureQuestion, timeout_s: float) -> Answer | KvRelayError:
    try:
        return await ask(client, **question.options(), timeout_s=timeout_s)
    except KvRelayError as error:
        return error
