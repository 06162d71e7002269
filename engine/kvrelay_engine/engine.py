"""The engine of one worker: commands in, events out, one step at a time.

    step = advance hand-offs -> schedule -> run -> commit

A Prefill computes its prompt in chunks and ends with the first token of each choice; with a hand-off its blocks
are pinned by a ticket from its first chunk on. A Decode gets its KV by a hand-off, or computes it here, and then
grows by a token each step. Synchronous and single-threaded; waits are `loop.py`'s. Knows no sockets or devices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from msgspec.structs import replace

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    DeadlineError,
    DrainingError,
    HandoffError,
    InternalError,
    KvRelayError,
    MismatchError,
    OverloadedError,
    RequestCancelledError,
)
from kvrelay_core.request import FinishReason, FirstToken, Usage
from kvrelay_engine import messages
from kvrelay_engine.branching import Branching, tokens_to_branch_with
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.deadlines import Deadlines
from kvrelay_engine.embeddings.reader import EmbeddingsLost
from kvrelay_engine.engine_load import EngineLoad
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.failed_steps import FailedSteps
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken
from kvrelay_engine.handoff_source import HandoffSource
from kvrelay_engine.intake import EngineLimits, Intake
from kvrelay_engine.prefix_cache import make_cache
from kvrelay_engine.prefix_messages import LookupPrefix
from kvrelay_engine.remote_kv import PullEnded, RemoteKv
from kvrelay_engine.sampler import SampledToken, Sampler
from kvrelay_engine.sampling_plan import Drawn, plan_draws
from kvrelay_engine.scheduler import Batch, Scheduler
from kvrelay_engine.sequence import EngineRequest, Sequence, SequenceState
from kvrelay_engine.sliding_blocks import make_sliding
from kvrelay_engine.step_output import StepOutput
from kvrelay_engine.stop_conditions import finish_reason
from kvrelay_engine.throughput import Throughput

logger = logging.getLogger(__name__)


class Engine:
    def __init__(self, config: EngineConfig, parts: EngineParts) -> None:
        self._config = config
        self._clock = parts.clock
        self._emit = parts.emit
        self._runner = parts.runner
        self._synchronize = parts.synchronize
        self._layout = parts.layout
        self._sampler = Sampler()
        self._throughput = Throughput()
        self._output = StepOutput(parts.emit)
        sliding = make_sliding(config, parts, lambda: self.remote_kv.num_sliding_held)
        self._cache = make_cache(parts, sliding)
        self._branching = Branching(parts, sliding)
        self.source = HandoffSource(
            parts.pool, parts.layout, parts.identity, parts.signer, config.lease, config.max_pinned_share, parts.clock,
            parts.emit, staging=parts.staging, digester=parts.digester, connectors=parts.connectors.values(),
            sliding=sliding,
        )  # fmt: skip
        self.scheduler = Scheduler(
            config, parts.pool, parts.layout, self._cache, self._throughput, parts.clock, self.source.can_accept,
            self._give_up_handoff, lambda: self.remote_kv.num_quarantined, parts.media, sliding,
        )  # fmt: skip
        self.remote_kv = RemoteKv(config, parts, self._cache, self._throughput, self.scheduler, sliding)
        limits = EngineLimits.of(config, parts, self.source.max_pinned_blocks)
        self.max_model_len = limits.max_model_len
        self._intake = Intake(limits, parts.layout, self._cache, sliding)
        self._requests: dict[int, EngineRequest] = {}
        self._deadlines = Deadlines(self._requests)
        self._lost: dict[int, float] = {}  # request -> until when it waits for Resume
        self._num_steps = 0
        self._failed_steps = FailedSteps()
        self.is_draining = False  # it was told, for good
        self.load = EngineLoad(parts.pool, self.scheduler, self.source, self.remote_kv, sliding)

    # ----------------------------------------------------------------------------------------- the loop

    def step(self) -> bool:
        """One turn; True if it computed something. Waits for the device, and for KV that is due at once."""
        self.source.tick()
        self._advance_remote_kv()
        self._expire()
        batch = self.scheduler.schedule()
        self._announce(batch)
        if batch.rows:
            self._compute(batch)
        self._output.flush()
        return bool(batch.rows)

    def _compute(self, batch: Batch) -> None:
        started_s = self._clock.now()
        num_tokens = sum(row.num_tokens for row in batch.rows)
        try:
            self._commit(batch, self._run(batch))
            self._failed_steps.clear()
        except Exception as error:
            self._fail_batch(batch, error)
        seconds = self._clock.now() - started_s
        self.scheduler.record_step(num_tokens, seconds)
        if num_tokens > len(batch.rows):
            self._throughput.record(num_tokens, seconds)

    def _run(self, batch: Batch) -> Drawn:
        self._num_steps += 1
        for row in batch.rows:
            row.sequence.last_step = self._num_steps
        logits_RV = self._runner.run(self.remote_kv.media.lay_out(batch.rows))
        plan = plan_draws(batch)
        drawn = plan.collect(self._sampler.sample(logits_RV, plan.rows) if plan.rows else [])
        self._synchronize()
        self.scheduler.complete_step(self._num_steps)
        return drawn

    def _commit(self, batch: Batch, drawn: Drawn) -> None:
        """The step has completed: its blocks are sealed, its tokens count."""
        broken = {sequence.request for sequence in drawn.broken}
        for request in broken:
            self._fail_broken(request)
        rows = [row for row in batch.rows if row.sequence.request not in broken]
        for row in rows:
            sequence = row.sequence
            self._cache.seal(sequence, row.num_tokens, row.words)
            if sequence.request.handoff:
                self.source.sealed(sequence, sequence.num_computed // self._layout.block_tokens)
        for row in rows:
            if not row.wants_logits:
                continue
            request, tokens = row.sequence.request, drawn.tokens[row.sequence]
            if request.is_prefill:
                self._finish_prefill(request, tokens)
            elif request.pending_choices:
                self._branch(request, tokens)
            else:
                self._append(row.sequence, tokens[row.sequence.choice])

    # ---------------------------------------------------------------------------------------- commands

    def handle(self, command: messages.EngineCommand) -> None:
        """Never raises for what a request or a peer did wrong: that is answered by an event."""
        match command:
            case messages.Prefill() | messages.Decode():
                self._start(command)
            case messages.Abort():
                self._abort(command)
            case messages.Resume():
                self._resume(command)
            case messages.GetLoad(call, check_integrity):
                self._emit(self.load.reply(call, check_integrity, self._num_steps))
            case messages.Drain():
                self.is_draining = True
            case messages.Shutdown():
                self.close()
            case (
                messages.FollowAttach() | messages.FollowBeat() | messages.FollowLost() | messages.FollowRelease()
                | messages.ReleaseTicket() | messages.PrefillStreamClosed() | messages.Export() | LookupPrefix()
            ):  # fmt: skip
                self.source.handle(command)
            case _:
                self.remote_kv.handle(command)

    def _start(self, command: messages.Prefill | messages.Decode) -> None:
        if command.id in self._requests:
            self._fail(self._requests[command.id], InternalError(f"two requests with the id {command.id}"))
            return
        try:
            if self.is_draining:
                raise DrainingError("the worker is draining; place the request elsewhere")
            request = self._intake.build(command, self._clock.now())
            if self.remote_kv.begin(request, command):
                self.scheduler.add_remote(request.trunk)
            else:
                self._queue(request)
        except KvRelayError as error:
            self._emit(messages.RequestFailed(command.id, info_of(error)))
            return
        self._requests[request.id] = request
        self._deadlines.add(request)

    def _queue(self, request: EngineRequest) -> None:
        self.scheduler.add(request.trunk)
        if request.is_prefill:
            eta_s = self._throughput.seconds_for(self.scheduler.num_queued_tokens)
            self._emit(messages.Queued(request.id, eta_s))

    def _abort(self, command: messages.Abort) -> None:
        error = RequestCancelledError(command.reason)
        request = self._requests.get(command.id)
        if request is not None:
            request.unwanted.update(command.choices)
            if not command.choices or not request.is_wanted:
                self._end(request, error)
            else:
                self._drop_unwanted(request)
        elif not command.choices:
            self.source.failed(command.id, error)  # a finished prefill whose ticket is still leased

    def _drop_unwanted(self, request: EngineRequest) -> None:
        for sequence in request.unwanted_sequences:
            self.scheduler.remove(sequence)

    def _resume(self, command: messages.Resume) -> None:
        """Computes here what is missing; blocks that were verified are found in the prefix cache."""
        request = self._requests.get(command.id)
        if request is None or request.trunk.state is not SequenceState.WAITING_REMOTE_KV:
            return  # it crossed with the request's end
        self._lost.pop(request.id, None)
        self.remote_kv.abort(request.id)
        self.scheduler.remove(request.trunk)
        choices = tuple(choice for choice in command.choices if choice.index not in request.unwanted)
        request.generation = replace(request.generation, choices=choices)
        try:
            self._intake.plant_trunk(request)
        except KvRelayError as error:
            self._fail(request, error)
            return
        if not self.scheduler.add_recompute(request.trunk):
            self._hand_back(request, "too much of it would have to be computed again here; place the request anew")

    def beat(self) -> None:
        """Tells the service that the loop is alive, what it holds and how far its hand-offs are."""
        self._emit(messages.Beat(self.load.report(self._num_steps), self.remote_kv.pulled_blocks(), self.is_draining))

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def is_idle(self) -> bool:
        """No request, lease or transfer: every block is free."""
        return not (self._requests or self.source.num_leases or self.remote_kv.num_transfers)

    def close(self) -> None:
        """Ends every request and hand-off without a word to anybody."""
        for request in list(self._requests.values()):
            self._end(request, DrainingError("the worker shuts down"))
        self.remote_kv.close()

    # ---------------------------------------------------------------------------------- prefill's outcome

    def _announce(self, batch: Batch) -> None:
        """Before the batch runs: tickets of those whose first chunk is in it; and who has to go."""
        for request in batch.handed_back:
            self._hand_back(request, "preempted, and too long to be computed again here; place the request anew")
        for request in batch.crowded_out:
            self._fail(request, OverloadedError("decoding needs its blocks; offer the ticket to another decode worker"))
        for sequence in batch.admitted:
            request = sequence.request
            if request.first_scheduled_s is None:
                request.first_scheduled_s = self._clock.now()
                if request.is_prefill:
                    ticket = self.source.accept(sequence) if request.handoff else None
                    self._emit(messages.Accepted(request.id, ticket, sequence.num_cached))

    def _hand_back(self, request: EngineRequest, reason: str) -> None:
        """It holds nothing any more."""
        del self._requests[request.id]
        self._output.flush()
        self._emit(messages.HandedBack(request.id, info_of(OverloadedError(reason))))

    def _finish_prefill(self, request: EngineRequest, tokens: Mapping[int, SampledToken]) -> None:
        trunk = request.trunk
        position = trunk.num_generated
        first_tokens = tuple(
            FirstToken(choice, position, token.token_id, token.logprobs, self._finish_reason(trunk, token.token_id))
            for choice, token in tokens.items()
        )
        if request.handoff:
            self.source.finished(trunk, first_tokens)
        usage = Usage(trunk.num_prompt, trunk.num_cached, len(first_tokens))
        queue_s, compute_s = request.time_split(self._clock.now())
        self._forget(request)
        self._emit(messages.PrefillFinished(request.id, first_tokens, usage, queue_s, compute_s))

    # ----------------------------------------------------------------------------------- decode's tokens

    def _branch(self, request: EngineRequest, tokens: Mapping[int, SampledToken]) -> None:
        """The trunk's KV is here. Choices without a token of their own go on with committed ones."""
        branches = self._branching.branch(request.trunk)
        self._drop_unwanted(request)
        for sequence in [one for one in branches if one.choice not in request.unwanted]:
            self.scheduler.start_branch(sequence)
            if sequence.choice in tokens:
                self._append(sequence, tokens[sequence.choice])

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        reason = self._finish_reason(sequence, token.token_id)
        self._output.add_token(sequence, sequence.num_generated, token.token_id, token.logprobs)
        sequence.tokens.append(token.token_id)
        if reason is not None:
            self._finish_choice(sequence, reason)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        return finish_reason(sequence.request.generation, sequence.num_generated, token_id, self.max_model_len)

    def _finish_choice(self, sequence: Sequence, reason: FinishReason) -> None:
        request = sequence.request
        self.scheduler.remove(sequence)
        stop_id = sequence.tokens[-1] if reason is FinishReason.STOP else None
        self._output.add_finished(
            messages.ChoiceFinished(request.id, sequence.choice, reason, sequence.num_generated, stop_id)
        )
        if all(other.state is SequenceState.FINISHED for other in request.sequences):
            del self._requests[request.id]

    # ----------------------------------------------------------------------------------------- hand-offs

    def _advance_remote_kv(self) -> None:
        for outcome in self.remote_kv.poll():
            match outcome:
                case HandoffArrived(request_id):
                    self._arrive(self._requests[request_id], outcome)
                case HandoffBroken(request_id):
                    self._lose(self._requests[request_id], outcome)
                case PullEnded(sequence):
                    self._queue(sequence.request)
                case EmbeddingsLost(request_id, error):
                    self._fail(self._requests[request_id], error)

    def _arrive(self, request: EngineRequest, arrived: HandoffArrived) -> None:
        try:
            tokens = tokens_to_branch_with(request, arrived.first_tokens)
        except MismatchError as error:
            self._fail(request, error)
            return
        self._emit(messages.HandoffDone(request.id, arrived.timing))
        self._branch(request, tokens)

    def _give_up_handoff(self, sequence: Sequence) -> None:
        self.remote_kv.abort(sequence.request.id, messages.ReleaseReason.REFUSED)

    def _lose(self, request: EngineRequest, broken: HandoffBroken) -> None:
        """A refused ticket goes back to the router; of any other loss the router decides (PROTOCOL C3)."""
        self.scheduler.lose_remote(request.trunk)
        if broken.is_refused:
            self._fail(request, broken.error)
            return
        self._lost[request.id] = self._clock.now() + self._config.resume_timeout_s
        error = info_of(broken.error)
        self._emit(messages.HandoffLost(request.id, broken.verified_blocks, broken.verified_tokens, error))

    # -------------------------------------------------------------------------------------------- ends

    def _expire(self) -> None:
        now_s = self._clock.now()
        for request in self._deadlines.pop_due(now_s):
            self._fail(request, DeadlineError(f"the deadline passed; the request was {request.trunk.state.value}"))
        for request_id in [lost for lost, until_s in self._lost.items() if until_s <= now_s]:
            error = HandoffError("the hand-off was lost, and neither Resume nor Abort came in time")
            self._fail(self._requests[request_id], error)

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        """The requests of a step that raised are over; the engine is not, if its pool is still sound."""
        logger.error("a step failed", exc_info=error)
        typed = error if isinstance(error, KvRelayError) else InternalError(f"the engine's step failed: {error!r}")
        self._synchronize()  # before blocks are freed that the step may still write to
        self.scheduler.complete_step(self._num_steps)
        for request in {row.sequence.request.id: row.sequence.request for row in batch.rows}.values():
            if self._requests.get(request.id) is request:
                self._fail(request, typed)
        self.load.check_integrity()
        self._failed_steps.add(error)

    def _fail_broken(self, request: EngineRequest) -> None:
        """Its logits are not numbers. Where its KV is not either, nobody else must find it."""
        for sequence in request.sequences:
            self._cache.disown(sequence)
        self._fail(request, InternalError("the model gave logits that are not numbers; its weights may be damaged"))

    def _fail(self, request: EngineRequest, error: KvRelayError) -> None:
        self._end(request, error)
        self._output.flush()
        self._emit(messages.RequestFailed(request.id, info_of(error)))

    def _end(self, request: EngineRequest, error: KvRelayError) -> None:
        """Before its natural end: whoever reads from us or sends to us is told."""
        self.remote_kv.abort(request.id)
        self._forget(request)
        if request.handoff:
            self.source.failed(request.id, error)

    def _forget(self, request: EngineRequest) -> None:
        del self._requests[request.id]
        self.remote_kv.media.forget(request.id)
        self._lost.pop(request.id, None)
        for sequence in request.sequences:
            self.scheduler.remove(sequence)
