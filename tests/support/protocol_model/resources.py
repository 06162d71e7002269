"""Model of PROTOCOL B1, B5 and B6: blocks as counts, and whether every request gets through.

Requests are placed on a decode worker at once, prefill in one pool, hand their blocks over and decode. Timers are
left out on purpose: what only the expiry of a lease would resolve counts as STUCK here. Not modelled: which
blocks, what is in them, failures of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from protocol_model.explorer import replaced

OVERCOMMITTED = "OVERCOMMITTED"


@dataclass(frozen=True)
class ResourceRules:
    exports_unpinned: bool = True  # B1: KV kept for a next turn is not pinned; it lives by the fence
    refuse_too_large: bool = True  # B5: a prompt above the pinned share or the pool is refused at once
    reserve_prompt_whole: bool = True  # B6: prefill reserves the prompt's blocks in one step, not chunk by chunk
    reserve_at_first_ready: bool = True  # B6: decode reserves when the source computes, not when it is placed
    reserve_all_or_nothing: bool = True  # B6: decode never waits with a part of its blocks
    keep_growth_watermark: bool = True  # B6: reservations leave room for the growth of running sequences
    offer_ticket_elsewhere: bool = True  # B6: a decode worker without room refuses, and the ticket moves on


@dataclass(frozen=True)
class ResourceScene:
    """Pool sizes in blocks. `sizes` has one entry per request: the blocks of its prompt."""

    sizes: tuple[int, ...]
    prefill_blocks: int
    decode_blocks: tuple[int, ...]  # of each decode worker; requests are placed on them in turn
    growth: int = 0  # blocks that a request needs beside its prompt's before it can finish
    next_turns: int = 0  # the last so many requests continue a turn whose KV their decode worker still has


class Phase(StrEnum):
    QUEUED = "queued"
    ACCEPTED = "accepted"
    COMPUTED = "computed"
    DECODING = "decoding"
    OVER = "over"


class Job(NamedTuple):
    worker: int  # decode worker it is placed on
    phase: Phase = Phase.QUEUED
    prefill_held: int = 0
    decode_held: int = 0
    exported: int = 0  # blocks of the previous turn that are pinned in the decode worker for this one


ResourceState = tuple[Job, ...]
Step = tuple[str, ResourceState]


class ResourceModel:
    def __init__(self, scene: ResourceScene, rules: ResourceRules) -> None:
        self._scene = scene
        self._rules = rules

    def initial(self) -> ResourceState:
        num_jobs, num_workers = len(self._scene.sizes), len(self._scene.decode_blocks)
        first_next_turn = num_jobs - self._scene.next_turns
        return tuple(
            Job(
                worker=i % num_workers,
                exported=0 if i < first_next_turn or self._rules.exports_unpinned else self._scene.sizes[i],
            )
            for i in range(num_jobs)
        )

    def steps(self, state: ResourceState) -> Iterator[Step]:
        for index, job in enumerate(state):
            for name, changed in self._job_steps(state, index, job):
                yield f"{name}({index})", replaced(state, index, changed)

    def violation(self, state: ResourceState) -> str | None:
        if self._prefill_free(state) < 0 or any(self._decode_free(state, w) < 0 for w in self._workers):
            return f"{OVERCOMMITTED}: more blocks are held than there are"
        return None

    def is_finished(self, state: ResourceState) -> bool:
        return all(job.phase is Phase.OVER for job in state)

    # -------------------------------------------------------------------------------------------- steps

    def _job_steps(self, state: ResourceState, index: int, job: Job) -> Iterator[tuple[str, Job]]:
        size = self._scene.sizes[index]
        if job.phase is Phase.QUEUED:
            yield from self._prefill_reserve_steps(state, job, size)
        if job.phase is Phase.ACCEPTED:
            # A next turn is pulled from the decode worker's export, which may go as soon as it is here.
            yield "P.computed", job._replace(phase=Phase.COMPUTED, exported=0)
        if job.phase in self._may_reserve:
            yield from self._decode_reserve_steps(state, job, size)
        if job.phase is Phase.COMPUTED and job.decode_held == size:
            yield "D.pulled", job._replace(phase=Phase.DECODING, prefill_held=0)
        if job.phase is Phase.DECODING:
            yield from self._decode_steps(state, job, size)

    @property
    def _may_reserve(self) -> tuple[Phase, ...]:
        from_the_start = () if self._rules.reserve_at_first_ready else (Phase.QUEUED,)
        return (*from_the_start, Phase.ACCEPTED, Phase.COMPUTED)

    def _prefill_reserve_steps(self, state: ResourceState, job: Job, size: int) -> Iterator[tuple[str, Job]]:
        if size > self._scene.prefill_blocks and self._rules.refuse_too_large:
            yield "P.refuse", Job(job.worker, Phase.OVER)
            return
        wanted = size if self._rules.reserve_prompt_whole else 1
        if wanted <= self._prefill_free(state):
            held = job.prefill_held + wanted
            phase = Phase.ACCEPTED if held == size else Phase.QUEUED
            yield f"P.reserve+{wanted}", job._replace(phase=phase, prefill_held=held)

    def _decode_reserve_steps(self, state: ResourceState, job: Job, size: int) -> Iterator[tuple[str, Job]]:
        missing = size - job.decode_held
        if missing == 0:
            return
        wanted = missing if self._rules.reserve_all_or_nothing else 1
        watermark = self._scene.growth if self._rules.keep_growth_watermark else 0
        free = self._decode_free(state, job.worker)
        if wanted + watermark <= free:
            yield f"D.reserve+{wanted}", job._replace(decode_held=job.decode_held + wanted)
        elif self._rules.offer_ticket_elsewhere and len(self._workers) > 1:
            yield "D.refuse", job._replace(worker=(job.worker + 1) % len(self._workers), decode_held=0)

    def _decode_steps(self, state: ResourceState, job: Job, size: int) -> Iterator[tuple[str, Job]]:
        if job.decode_held == size + self._scene.growth:
            yield "D.finish", Job(job.worker, Phase.OVER)
        elif self._decode_free(state, job.worker) > 0:
            yield "D.grow", job._replace(decode_held=job.decode_held + 1)

    # --------------------------------------------------------------------------------------- accounting

    @property
    def _workers(self) -> range:
        return range(len(self._scene.decode_blocks))

    def _prefill_free(self, state: ResourceState) -> int:
        return self._scene.prefill_blocks - sum(job.prefill_held for job in state)

    def _decode_free(self, state: ResourceState, worker: int) -> int:
        held = sum(job.decode_held + job.exported for job in state if job.worker == worker)
        return self._scene.decode_blocks[worker] - held
