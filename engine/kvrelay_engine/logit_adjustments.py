"""Which single logits of a row change before a token is drawn: logit_bias, penalties, and bans by min_tokens.

Arrays of E entries (token, and three terms as `kvrelay_kernels.sampling.apply_penalties` takes them). A repetition
penalty concerns every token of the prompt, so that part is done in numpy, and a prompt is sorted only once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvrelay_core.request import SamplingParams

Tokens = NDArray[np.int64]


class PromptTokens:
    """A prompt, and its distinct tokens from the moment when somebody asks for them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    @cached_property
    def distinct(self) -> Tokens:
        return np.unique(np.asarray(self.tokens, dtype=np.int64))


@dataclass(slots=True, frozen=True)
class Adjustments:
    tokens_E: Tokens  # distinct
    terms_3E: NDArray[np.float32]  # bias, repetition penalty, amount to subtract


def adjustments(
    params: SamplingParams, prompt: PromptTokens, output: Sequence[int], banned: set[int], vocab_size: int
) -> Adjustments:
    counts = Counter(output) if params.frequency_penalty or params.presence_penalty else Counter[int]()

    def subtrahend(token: int) -> float:
        if token in banned:
            return math.inf
        count = counts.get(token, 0)
        return count * params.frequency_penalty + params.presence_penalty if count else 0.0

    named_E = np.asarray(sorted({*params.logit_bias, *counts, *banned}), dtype=np.int64)
    prompt_E, written_E = _repeated(params, prompt, output)
    others_E = np.concatenate([prompt_E, written_E[~_is_in(written_E, prompt_E)]])
    others_E = others_E[~_is_in(others_E, named_E)]
    terms_3E = np.zeros((3, len(named_E) + len(others_E)), dtype=np.float32)
    terms_3E[1] = params.repetition_penalty
    terms_3E[1, : len(named_E)][~(_is_in(named_E, prompt_E) | _is_in(named_E, written_E))] = 1.0
    for index, token in enumerate(named_E.tolist()):
        terms_3E[0, index] = params.logit_bias.get(token, 0.0)
        terms_3E[2, index] = subtrahend(token)
    tokens_E = np.concatenate([named_E, others_E])
    is_known_E = (tokens_E >= 0) & (tokens_E < vocab_size)
    return Adjustments(tokens_E[is_known_E], terms_3E[:, is_known_E])


def _repeated(params: SamplingParams, prompt: PromptTokens, output: Sequence[int]) -> tuple[Tokens, Tokens]:
    """The distinct tokens of prompt and output, sorted, where they matter."""
    if params.repetition_penalty == 1:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return prompt.distinct, np.unique(np.asarray(output, dtype=np.int64))


def _is_in(tokens_E: Tokens, sorted_S: Tokens) -> NDArray[np.bool_]:
    """numpy's own `isin` would sort both."""
    if not len(sorted_S):
        return np.zeros(len(tokens_E), dtype=np.bool_)
    at_E = np.searchsorted(sorted_S, tokens_E).clip(max=len(sorted_S) - 1)
    is_in_E: NDArray[np.bool_] = sorted_S[at_E] == tokens_E
    return is_in_E
