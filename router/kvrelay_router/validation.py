"""Checks a GenerateRequest and fills in every default: what comes out can be served as it is.

Each refusal names the field, the value and what is allowed. Knows nothing of workers beyond the model they serve;
the prompt's tokens are made by `prompt.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.common_pb2 import SamplingParams as WireSampling
from kvrelay_core.checkpoint import GenerationDefaults
from kvrelay_core.errors import InvalidRequestError, UnknownModelError, UnsupportedError
from kvrelay_core.request import ChoiceState, Generation, SamplingParams
from kvrelay_core.rpc.wire import slo_from_wire
from kvrelay_core.sampling_limits import LOGIT_BIAS_RANGE, SAMPLING_RANGES, Range, check_range
from kvrelay_router.config import RequestLimits
from kvrelay_router.media_input import MediaInput, media_items
from kvrelay_router.prompt import Prompt
from kvrelay_router.registry import ServedModel


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request without doubts. `stop` stays in the router; workers see token ids alone."""

    generation: Generation
    stop: tuple[str, ...]
    session_id: str = ""
    items: tuple[MediaInput, ...] = ()  # what `generation.media` refer to

    @property
    def wants_logprobs(self) -> bool:
        return self.generation.sampling.logprobs is not None


_SLO = Range(0, above=True)


class RequestChecker:
    def __init__(
        self, served_name: str, defaults: GenerationDefaults, limits: RequestLimits, no_media: str = ""
    ) -> None:
        """`no_media` says why media are refused, and what to do about it; empty: they are not."""
        self._no_media = no_media
        self._served_name = served_name
        self._defaults = defaults
        self._limits = limits

    def check_envelope(self, request: pb.GenerateRequest) -> None:
        """All that needs no tokens, so that a bad request costs no tokenization."""
        self.check_model(request.model)
        if media_items(request) and self._no_media:
            raise UnsupportedError(f"media: {self._no_media}", field="media")
        for name in ("request_id", "session_id", "cache_salt"):
            length = len(getattr(request, name))
            _require(length <= self._limits.max_name_chars, name, f"{length} characters", self._limits.max_name_chars)
        for name in ("ttft_ms", "itl_ms"):
            if request.slo.HasField(name):  # type: ignore[arg-type]
                check_range(f"slo.{name}", getattr(request.slo, name), _SLO)
        self._check_sampling(request.sampling)

    def check_model(self, name: str) -> None:
        """Raises UnknownModelError unless it is the served one; empty means the only one."""
        if name not in ("", self._served_name):
            raise UnknownModelError(f"model {name!r} is not served here; use {self._served_name!r}", field="model")

    def complete(self, request: pb.GenerateRequest, prompt: Prompt, model: ServedModel) -> CheckedRequest:
        """With the prompt's tokens and the model that serves them. `check_envelope` came before."""
        _check_prompt(prompt, model)
        num_taken = len(prompt.token_ids) + prompt.positions_ahead
        sampling = self._resolve_sampling(request.sampling, num_taken, model)
        wire = request.sampling
        generation = Generation(
            prompt=tuple(prompt.token_ids),
            sampling=sampling,
            seed=wire.seed if wire.HasField("seed") else secrets.randbits(64),
            choices=tuple(map(ChoiceState, range(wire.n if wire.HasField("n") else 1))),
            eos_token_ids=self._defaults.eos_token_ids,
            cache_salt=request.cache_salt,
            priority=request.priority,
            slo=slo_from_wire(request.slo),
            media=prompt.media,
        )
        return CheckedRequest(generation, tuple(wire.stop), request.session_id, prompt.items)

    def _check_sampling(self, wire: WireSampling) -> None:
        limits = self._limits
        for name, allowed in SAMPLING_RANGES.items():
            if wire.HasField(name):  # type: ignore[arg-type]
                check_range(f"sampling.{name}", getattr(wire, name), allowed)
        if wire.HasField("n"):
            _require(1 <= wire.n <= limits.max_choices, "sampling.n", wire.n, f"1 to {limits.max_choices}")
        if wire.HasField("logprobs"):
            allowed_logprobs = f"0 to {limits.max_logprobs}"
            _require(wire.logprobs <= limits.max_logprobs, "sampling.logprobs", wire.logprobs, allowed_logprobs)
        if wire.HasField("max_tokens"):
            _require(wire.max_tokens >= 1, "sampling.max_tokens", wire.max_tokens, "at least 1")
        _check_count("sampling.stop", len(wire.stop), limits.max_stop_strings)
        for stop in wire.stop:
            fits = 1 <= len(stop) <= limits.max_stop_chars
            _require(fits, "sampling.stop", f"a string of {len(stop)} characters", f"1 to {limits.max_stop_chars}")
        _check_count("sampling.stop_token_ids", len(wire.stop_token_ids), limits.max_stop_token_ids)
        _check_count("sampling.logit_bias", len(wire.logit_bias), limits.max_logit_bias)
        for bias in wire.logit_bias.values():
            check_range("sampling.logit_bias", bias, LOGIT_BIAS_RANGE)

    def _resolve_sampling(self, wire: WireSampling, num_taken: int, model: ServedModel) -> SamplingParams:
        room = model.max_model_len - num_taken
        max_tokens = wire.max_tokens if wire.HasField("max_tokens") else room
        allowed = f"1 to {room}: the prompt's {num_taken} tokens count too, and the model takes {model.max_model_len}"
        _require(max_tokens <= room, "sampling.max_tokens", max_tokens, allowed)
        allowed = f"0 to max_tokens, which is {max_tokens}"
        _require(wire.min_tokens <= max_tokens, "sampling.min_tokens", wire.min_tokens, allowed)
        _check_ids("sampling.stop_token_ids", wire.stop_token_ids, model.vocab_size)
        _check_ids("sampling.logit_bias", tuple(wire.logit_bias), model.vocab_size)
        defaults, neutral = self._defaults, SamplingParams()

        def pick(name: str) -> float:
            if wire.HasField(name):  # type: ignore[arg-type]
                return float(getattr(wire, name))
            default = getattr(defaults, name, None)
            return float(getattr(neutral, name) if default is None else default)

        return SamplingParams(
            temperature=pick("temperature"),
            top_p=pick("top_p"),
            top_k=int(pick("top_k")),
            min_p=pick("min_p"),
            repetition_penalty=pick("repetition_penalty"),
            frequency_penalty=pick("frequency_penalty"),
            presence_penalty=pick("presence_penalty"),
            max_tokens=max_tokens,
            min_tokens=wire.min_tokens,
            stop_token_ids=tuple(dict.fromkeys(wire.stop_token_ids)),
            ignore_eos=wire.ignore_eos,
            logprobs=wire.logprobs if wire.HasField("logprobs") else None,
            logit_bias=dict(wire.logit_bias),
        )


def _check_prompt(prompt: Prompt, model: ServedModel) -> None:
    num_tokens = len(prompt.token_ids)
    if not num_tokens:
        raise InvalidRequestError("the prompt is empty; send at least one token", field="prompt")
    if num_tokens >= model.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens; allowed: at most {model.max_model_len - 1}, so that one token of "
            f"output fits into the model's {model.max_model_len}",
            field="prompt",
        )
    if num_tokens + prompt.positions_ahead >= model.max_model_len:
        raise InvalidRequestError(
            f"the prompt's video lasts so long that what comes behind it begins at position "
            f"{num_tokens + prompt.positions_ahead}; the model has {model.max_model_len}; send fewer frames, or a "
            "shorter part",
            field="media",
        )
    _check_ids("token_ids", prompt.token_ids, model.vocab_size)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    worst = max(ids, default=0)
    _require(worst < vocab_size, field, f"token id {worst}", f"0 to {vocab_size - 1}, the model's vocabulary")


def _check_count(field: str, count: int, most: int) -> None:
    _require(count <= most, field, f"a list of {count}", f"at most {most}")


def _require(condition: bool, field: str, value: object, allowed: object) -> None:
    if not condition:
        bound = f"at most {allowed} characters" if isinstance(allowed, int) else allowed
        raise InvalidRequestError(f"{field} is {value}; allowed: {bound}", field=field)
