"""What an engine holds, counted; and the proof that the counts fit together."""

from __future__ import annotations

from collections import Counter

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import InternalError
from kvrelay_core.request import ErrorInfo
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_source import HandoffSource
from kvrelay_engine.messages import Load, LoadReply
from kvrelay_engine.remote_kv import RemoteKv
from kvrelay_engine.scheduler import Scheduler
from kvrelay_engine.sliding_blocks import SlidingBlocks


class EngineLoad:
    def __init__(
        self,
        pool: BlockPool,
        scheduler: Scheduler,
        source: HandoffSource,
        remote_kv: RemoteKv,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        self._pool = pool
        self._sliding = sliding
        self._scheduler = scheduler
        self._source = source
        self._remote_kv = remote_kv

    def report(self, num_steps: int) -> Load:
        scheduler = self._scheduler
        return Load(
            requests_waiting=len({sequence.request for sequence in scheduler.waiting}),
            requests_waiting_remote_kv=len(scheduler.remote),
            requests_running=len({sequence.request for sequence in scheduler.running}),
            tokens_queued=scheduler.num_queued_tokens,
            blocks_total=self._pool.num_blocks - 1,
            blocks_in_use=self._pool.num_in_use,
            blocks_cached=self._pool.num_cached,
            blocks_pinned=self._source.num_pinned,
            blocks_quarantined=self._remote_kv.num_quarantined,
            sliding_blocks=0 if self._sliding is None else self._sliding.pool.num_in_use,
            leases=self._source.num_leases,
            transfers=self._remote_kv.num_transfers,
            embedding_blocks=self._remote_kv.media.num_blocks_in_use,
            steps=num_steps,
            handoff_bytes=self._remote_kv.reader.handoff_bytes,
            handoff_s=self._remote_kv.reader.handoff_s,
            stale_reads=self._remote_kv.stale_reads,
            prefix_blocks_pulled=self._remote_kv.pulls.num_pulled_blocks,
            tier_blocks_loaded=self._remote_kv.loads.num_loaded_blocks,
            tiers=self._remote_kv.loads.report(),
            failed_reads=sum(group.peers.failed_reads for group in self._remote_kv.reader.groups),
            fallbacks=sum(group.peers.fallbacks for group in self._remote_kv.reader.groups),
            digests_checked=sum(group.num_digests_checked for group in self._remote_kv.reader.groups),
            digests_wrong=sum(group.num_digests_wrong for group in self._remote_kv.reader.groups),
            links=self._remote_kv.reader.peers.load() + self._remote_kv.media.links(),
            connectors=self._remote_kv.reader.peers.records.totals(),
            expired_leases=self._source.num_expired,
        )

    def reply(self, call: int, check_integrity: bool, num_steps: int) -> LoadReply:
        """An inconsistency is an answer to whoever asked for the check."""
        return LoadReply(call, self.report(num_steps), self._inconsistency() if check_integrity else None)

    def _inconsistency(self) -> ErrorInfo | None:
        try:
            self.check_integrity()
        except AssertionError as error:
            return info_of(InternalError(str(error)))
        return None

    def check_integrity(self) -> None:
        """Asserts that every block is in one state and that nobody holds a block that is not accounted for."""
        self._pool.check_integrity()
        self._remote_kv.media.check_integrity()
        scheduler = self._scheduler
        if self._sliding is not None:
            self._sliding.check_integrity(scheduler.running)
        assert not any(sequence.blocks or sequence.sliding for sequence in scheduler.waiting), (
            "a waiting sequence holds blocks"
        )
        held = Counter(block for sequence in scheduler.running for block in sequence.blocks)
        for block, count in held.items():
            assert self._pool.references(block) >= count, f"block {block} is used by {count} sequences, held by fewer"
        if not scheduler.remote and not self._source.num_leases and not self._remote_kv.num_transfers:
            assert self._pool.num_in_use == len(held), f"{self._pool.num_in_use - len(held)} KV blocks leaked"
