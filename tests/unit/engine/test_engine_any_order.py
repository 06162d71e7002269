"""Random commands in random order to a pair of engines: the pools stay sound, answers stay exact, nothing is left."""

from __future__ import annotations

from typing import ClassVar

from engine_rig import EnginePair, make_generation, prompt_of
from fake_runner import continuation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay_core.errors import TransferError
from kvrelay_core.request import ChoiceState, ErrorInfo, Generation
from kvrelay_engine import messages
from kvrelay_transfer.connectors.base import TransferState

NUMBERS = st.integers(0, 100)
LOST = ErrorInfo("TransferError", "ABORTED", "the stream was lost")


class AnyOrder(RuleBasedStateMachine):
    """Small pools, so that hand-offs are refused and sequences preempted; reads land, fail or hang as drawn."""

    sliding: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        prefill = {"kv_blocks": 24, "max_batched_tokens": 8, "max_num_seqs": 4, "max_pinned_share": 0.6}
        decode = {"kv_blocks": 16, "max_batched_tokens": 8, "max_num_seqs": 3, "decode_alone_tokens": 24}
        self.pair = EnginePair(prefill={**prefill, **self.sliding}, decode={**decode, **self.sliding})
        self.pair.lands_reads = False
        self.generations: dict[int, Generation] = {}

    # --------------------------------------------------------------------------------- what may happen

    @rule(length=st.integers(1, 30), seed=st.integers(1, 3), max_tokens=st.integers(1, 9), choices=st.integers(1, 2))
    def submit(self, length: int, seed: int, max_tokens: int, choices: int) -> None:
        request_id = len(self.generations)
        generation = make_generation(prompt_of(length, seed), max_tokens, num_choices=choices)
        self.generations[request_id] = generation
        self.pair.submit(request_id, generation)

    @rule(length=st.integers(1, 30), seed=st.integers(1, 3), max_tokens=st.integers(1, 9), choices=st.integers(1, 3))
    def decode_alone(self, length: int, seed: int, max_tokens: int, choices: int) -> None:
        request_id = len(self.generations)
        self.generations[request_id] = make_generation(prompt_of(length, seed), max_tokens, num_choices=choices)
        self.pair.reader.decode(request_id, self.generations[request_id])

    @rule(number=NUMBERS, on_source=st.booleans(), on_reader=st.booleans())
    def abort(self, number: int, on_source: bool, on_reader: bool) -> None:
        if self.generations:
            request_id = number % len(self.generations)
            if on_source:
                self.pair.source.abort(request_id)
            if on_reader:
                self.pair.reader.abort(request_id)

    @rule(number=NUMBERS, choice=st.integers(0, 2))
    def abort_choice(self, number: int, choice: int) -> None:
        if self.generations:
            request_id = number % len(self.generations)
            self.pair.reader.engine.handle(messages.Abort(request_id, "a stop string", (choice,)))

    @rule(turns=st.integers(1, 6), seconds=st.sampled_from([0.0, 0.0, 0.0, 0.6, 3.0]))
    def turn(self, turns: int, seconds: float) -> None:
        self.pair.clock.advance(seconds)
        for _ in range(turns):
            self.pair.turn()

    @rule()
    def beat(self) -> None:
        self.pair.reader.engine.beat()
        self.pair.pump()

    @rule(number=NUMBERS)
    def land_a_read(self, number: int) -> None:
        pending = self.pair.fabric.pending
        if pending:
            pending[number % len(pending)].land()

    @rule(number=NUMBERS)
    def fail_a_read(self, number: int) -> None:
        pending = self.pair.fabric.pending
        if pending:
            pending[number % len(pending)].end(TransferState.FAILED, TransferError("the cable was cut"))

    @rule(number=NUMBERS)
    def lose_a_follow(self, number: int) -> None:
        if self.generations:
            request_id = number % len(self.generations)
            self.pair.reader.engine.handle(messages.HandoffFailed(request_id, LOST))
            self.pair.source.engine.handle(messages.FollowLost(request_id))

    @rule(number=NUMBERS)
    def resume(self, number: int) -> None:
        """As the router does: only what was lost, and only choices that have not ended."""
        lost = [event.id for event in self.pair.reader.of(messages.HandoffLost)]
        if not lost:
            return
        request_id = lost[number % len(lost)]
        choices = [
            ChoiceState(choice.index, tuple(self.pair.answer(request_id, choice.index)))
            for choice in self.generations[request_id].choices
        ]
        max_tokens = self.generations[request_id].sampling.max_tokens
        left = tuple(choice for choice in choices if len(choice.committed) < max_tokens)
        if left:
            self.pair.reader.engine.handle(messages.Resume(request_id, left))

    @rule(block=st.integers(1, 15))
    def flush_the_cache(self, block: int) -> None:
        self.pair.source.pool.clear_cache()
        if block % 2:
            self.pair.reader.pool.clear_cache()

    @rule(on_source=st.booleans())
    def flush_the_cache_of_the_windows(self, on_source: bool) -> None:
        group = (self.pair.source if on_source else self.pair.reader).sliding
        if group is not None:
            group.pool.clear_cache()

    # ------------------------------------------------------------------------------------ what must hold

    @invariant()
    def pools_are_sound(self) -> None:
        self.pair.source.load()
        self.pair.reader.load()
        assert not self.pair.source.runner.wrong_windows and not self.pair.reader.runner.wrong_windows

    @invariant()
    def answers_are_exact(self) -> None:
        for (request_id, _), committed in self.pair.committed.items():
            generation = self.generations[request_id]
            expected = continuation(generation.prompt, generation.sampling.max_tokens)
            assert all(expected[position] == token for position, token in committed.items())

    def teardown(self) -> None:
        """Everything ends, in part by its own means: nothing is held by anybody."""
        self.pair.lands_reads = True
        for request_id in range(0, len(self.generations), 2):
            self.pair.source.abort(request_id)
            self.pair.reader.abort(request_id)
        for _ in range(12):
            for _ in range(40):
                self.pair.turn()
            self.pair.clock.advance(3.0)
        for request_id in self.generations:
            self.pair.reader.abort(request_id)
            self.pair.source.abort(request_id)
        for _ in range(5):
            self.pair.turn()
        self.pair.check_empty()
        self.pair.close()


class AnyOrderWithWindows(AnyOrder):
    """Some layers see the last tokens only, and have a small pool of their own."""

    sliding: ClassVar[dict[str, int]] = {"window": 6, "sliding_blocks": 15}


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(deadline=None, max_examples=120, stateful_step_count=40)
TestAnyOrderWithWindows = AnyOrderWithWindows.TestCase
TestAnyOrderWithWindows.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
