"""From a command to a request: everything that can be refused at once is refused here, with the numbers.

Knows the limits of this engine; nothing of its present load.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from kvrelay_core.errors import InvalidRequestError, PoolExhaustedError
from kvrelay_core.media.references import check_references
from kvrelay_core.request import ChoiceState, Generation
from kvrelay_core.sampling_limits import check_sampling
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.messages import Decode, Prefill
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.sequence import EngineRequest, Sequence
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_transfer.layout import KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    vocab_size: int
    max_model_len: int  # tokens of prompt and output
    max_num_seqs: int
    max_blocks: int  # of one request
    max_pinned_blocks: int  # of all tickets

    @classmethod
    def of(cls, config: EngineConfig, parts: EngineParts, max_pinned_blocks: int) -> EngineLimits:
        max_blocks = parts.pool.num_blocks - 1
        return cls(
            vocab_size=parts.runner.vocab_size,
            max_model_len=min(parts.max_model_len, max_blocks * parts.layout.block_tokens),
            max_num_seqs=config.max_num_seqs,
            max_blocks=max_blocks,
            max_pinned_blocks=max_pinned_blocks,
        )


class Intake:
    def __init__(
        self, limits: EngineLimits, layout: KvLayout, cache: PrefixCache, sliding: SlidingBlocks | None = None
    ) -> None:
        self._limits = limits
        self._layout = layout
        self._cache = cache
        self._sliding = sliding

    def build(self, command: Prefill | Decode, now_s: float) -> EngineRequest:
        """Raises InvalidRequestError or PoolExhaustedError for what this engine can never do."""
        generation = command.generation
        check_sampling(generation.sampling)
        _check_times(generation)
        handoff = isinstance(command, Prefill) and command.handoff
        is_forked_late = len(generation.choices) > 1 and any(choice.committed for choice in generation.choices)
        if is_forked_late:
            raise InvalidRequestError("several choices with committed tokens: place each choice as its own request")
        request = EngineRequest(
            id=command.id,
            attempt=command.attempt,
            generation=generation,
            is_prefill=isinstance(command, Prefill),
            arrived_s=now_s,
            handoff=handoff,
            deadline_at_s=None if generation.deadline_s is None else now_s + generation.deadline_s,
            first_token_by_s=None if generation.slo.ttft_s is None else now_s + generation.slo.ttft_s,
        )
        self.plant_trunk(request)
        return request

    def plant_trunk(self, request: EngineRequest) -> None:
        """Gives the request the one sequence that it begins, or after a lost hand-off resumes, with.

        The trunk is the prompt, and the committed tokens where there is only one choice.
        """
        generation = request.generation
        self._check_tokens(generation)
        tokens = list(generation.prompt)
        if len(generation.choices) == 1:
            tokens += generation.choices[0].committed
        self._check_room(len(tokens), request.handoff)
        self._check_choices(generation, request.is_prefill)
        chain = self._cache.new_chain(generation.cache_salt, generation.media)
        trunk = Sequence(request, generation.choices[0].index, tokens, chain)
        request.sequences = [trunk]
        request.pending_choices = generation.choices
        if self._sliding is not None:
            self._sliding.check_fits(trunk)

    def _check_tokens(self, generation: Generation) -> None:
        if not generation.prompt:
            raise InvalidRequestError("the prompt is empty: send at least one token")
        inputs = (generation.prompt, *(choice.committed for choice in generation.choices))
        for tokens in inputs:
            if tokens and not 0 <= min(tokens) <= max(tokens) < self._limits.vocab_size:
                raise InvalidRequestError(
                    f"token ids must be in [0, {self._limits.vocab_size}), the model's vocabulary; "
                    f"the request has ids from {min(tokens)} to {max(tokens)}"
                )
        check_references(generation.media, len(generation.prompt))

    def _check_choices(self, generation: Generation, is_prefill: bool) -> None:
        choices = generation.choices
        if not choices or len({choice.index for choice in choices}) != len(choices):
            raise InvalidRequestError("choices must be at least one, each with an index of its own")
        if not is_prefill and len(choices) > self._limits.max_num_seqs:
            raise InvalidRequestError(
                f"{len(choices)} choices cannot run at once, max_num_seqs is {self._limits.max_num_seqs}; ask for fewer"
            )
        for choice in choices:
            self._check_room_for_output(generation, choice)

    def _check_room_for_output(self, generation: Generation, choice: ChoiceState) -> None:
        num_committed = len(choice.committed)
        if num_committed >= generation.sampling.max_tokens:
            raise InvalidRequestError(
                f"choice {choice.index} has {num_committed} tokens and max_tokens is {generation.sampling.max_tokens}: "
                "nothing is left to generate"
            )
        num_tokens = len(generation.prompt) + num_committed
        if num_tokens >= self._limits.max_model_len:
            raise InvalidRequestError(
                f"{num_tokens} tokens of input leave no room for output: at most {self._limits.max_model_len} tokens "
                "fit, prompt and output together (max_model_len, or the KV pool where that is smaller)",
                max_model_len=self._limits.max_model_len,
            )

    def _check_room(self, num_tokens: int, handoff: bool) -> None:
        needed = self._layout.blocks_for(num_tokens)
        if needed > self._limits.max_blocks:
            raise PoolExhaustedError(
                f"the prompt needs {needed} KV blocks, the whole pool has {self._limits.max_blocks}; shorten it "
                "or start the worker with more --kv-blocks",
                needed=needed,
            )
        if handoff and needed > self._limits.max_pinned_blocks:
            raise PoolExhaustedError(
                f"the prompt needs {needed} KV blocks, tickets may pin {self._limits.max_pinned_blocks} at once; "
                "shorten it or start the worker with more --kv-blocks",
                needed=needed,
            )


def _check_times(generation: Generation) -> None:
    for name, seconds in (("deadline_s", generation.deadline_s), ("slo.ttft_ms", generation.slo.ttft_s)):
        if seconds is not None and isnan(seconds):
            raise InvalidRequestError(f"{name} is not a number; leave it out where there is none", field=name)
