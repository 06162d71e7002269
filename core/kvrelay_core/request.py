"""What a request is, once the router has checked it and filled in every default.

These are the in-process forms; `wire.py` of each service converts them from and to protobuf. Knows nothing
of text: prompts and stop conditions are token ids here, stop *strings* are the router's own business.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class AttemptId(Struct, frozen=True, order=True, array_like=True):
    """One numbered placement of one request of one router instance."""

    router_id: str
    request_id: str
    attempt: int

    @property
    def request_key(self) -> tuple[str, str]:
        """What all attempts of the request share."""
        return (self.router_id, self.request_id)


class SamplingParams(Struct, frozen=True, kw_only=True):
    """Resolved sampling parameters; `temperature == 0` is greedy. See `kvrelay_engine.sampler`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    logit_bias: dict[int, float] = {}


class ChoiceState(Struct, frozen=True, array_like=True):
    """A choice and the tokens of it that the router has committed. Its next position is their number."""

    index: int
    committed: tuple[int, ...] = ()


class Slo(Struct, frozen=True):
    """What the request was promised. `ttft_s` is what is left of it once it is on its way: as a deadline, it runs
    from the moment that whoever holds it got it."""

    ttft_s: float | None = None  # until the first token of any choice
    itl_s: float | None = None  # from one token of a choice to the next


NO_SLO = Slo()


class MediaReference(Struct, frozen=True, array_like=True):
    """A run of placeholder tokens, and which rows of a media item's embedding they stand for.

    One run for each item, except where a model cuts an item into several (the crops of pan-and-scan): they share
    `content_hash`, and `first_row` tells them apart.
    """

    content_hash: bytes  # `media_hash` of what the client sent
    offset: int  # of the first placeholder in the prompt
    num_tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)  # patches in time, height, width, before merging; zeros: the family has none
    first_row: int = 0  # of the item's embedding, that the first placeholder takes
    seconds_per_grid: float = 0.0  # from one step of the grid in time to the next; 0: the item is no video


class Generation(Struct, frozen=True, kw_only=True):
    """Everything prefill and decode need to know of a request; identical for both.

    Several choices occur only while none has committed tokens: they fork from one prompt.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    choices: tuple[ChoiceState, ...] = (ChoiceState(0),)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    deadline_s: float | None = None
    slo: Slo = NO_SLO
    media: tuple[MediaReference, ...] = ()  # by offset, without overlap

    @property
    def tokens_to_prefill(self) -> tuple[int, ...]:
        """Prompt and committed tokens: the input whose KV prefill computes."""
        return self.prompt + self.choices[0].committed


class PrefixHint(Struct, frozen=True, array_like=True):
    """A worker that probably holds the KV of the first `num_tokens` tokens of a request's input."""

    source_address: str
    num_tokens: int


class TokenLogprobs(Struct, frozen=True, array_like=True):
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class FirstToken(Struct, frozen=True, array_like=True):
    """The token that prefill sampled for a choice. Position counts from the first generated token."""

    choice: int
    position: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


class Usage(Struct, frozen=True, array_like=True):
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class HandoffTiming(Struct, frozen=True, array_like=True):
    size_bytes: int = 0
    seconds: float = 0.0
    blocks_pulled: int = 0
    blocks_reused: int = 0
    connector: str = ""


class ErrorInfo(Struct, frozen=True, array_like=True):
    """An error as a message; see `kvrelay_core.errors.error_from`."""

    reason: str
    status: str
    message: str
    metadata: dict[str, str] = {}
