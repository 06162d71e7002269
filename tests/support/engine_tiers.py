"""Tiers for engines of `engine_rig`: real chains over fake stores that outlive an engine, and gates in the copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine_rig import FINGERPRINT, EngineRig
from handoff_sides import wait_until
from tier_rig import Gate

from kvrelay_core.clock import ManualClock
from kvrelay_core.hashing import root_hash
from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_engine.sequence import HashChain
from kvrelay_engine.tier_loads import TierLoads
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords, PartCopier
from kvrelay_transfer.tiers.part_key import KeyMaker, PartKey
from kvrelay_transfer.tiers.tier import Tier

CHUNK_TOKENS = 8  # two blocks
_SLOT_BYTES = 4096


class LastingStore(FakeStore):
    """What a Redis is to workers that come and go."""

    def close(self) -> None:
        """Another worker's chain may use it."""
        self.release()


class GatedCopier:
    """Copies out of and into the pool wait at gates."""

    def __init__(self, copier: PartCopier) -> None:
        self.leaving, self.coming = Gate(), Gate()
        self._copier = copier

    def copy_out(self, blocks: Sequence[int], part: int, into: memoryview) -> None:
        self.leaving.pass_through()
        self._copier.copy_out(blocks, part, into)

    def copy_in(self, blocks: Sequence[int], part: int, raw: memoryview) -> None:
        self.coming.pass_through()
        self._copier.copy_in(blocks, part, raw)


class GatedKv(KvRecords):
    def __init__(self, memory: PoolMemory) -> None:
        assert isinstance(memory.layout, KvLayout)
        super().__init__(memory, KvChunks(memory.layout, CHUNK_TOKENS, 1), KeyMaker((b"kv", FINGERPRINT)))
        self.gates = GatedCopier(self._copier)
        self._copier = self.gates


def tiers_over(*stores: FakeStore, num_slots: int = 64) -> Callable[[PoolMemory, ManualClock], KvTiers]:
    """For `EngineRig(make_tiers=...)`: host memory of so many chunks, and the stores below it."""

    def make(memory: PoolMemory, clock: ManualClock) -> KvTiers:
        host = HostStore(HostSlab(num_slots * _SLOT_BYTES, 1024))
        return KvTiers(TierChain(host, [Tier(store, clock) for store in stores], clock=clock), GatedKv(memory))

    return make


class TieredRig(EngineRig):
    """An engine over `stores`, all of which its chain may write to."""

    def __init__(self, *stores: FakeStore, role: str = "prefill", num_slots: int = 64, **changes: Any) -> None:
        super().__init__(role, make_tiers=tiers_over(*stores, num_slots=num_slots), **changes)
        assert self.tiers is not None and isinstance(self.tiers.kv, GatedKv)
        self.chain = self.tiers.chain
        self.gates = self.tiers.kv.gates

    @property
    def loads(self) -> TierLoads:
        return self.engine.remote_kv.loads

    def step_until(self, condition: Callable[[], bool]) -> None:
        """While threads work; no time passes for the engine meanwhile."""

        def is_there() -> bool:
            self.engine.step()
            return condition()

        wait_until(is_there)

    def compute(self) -> None:
        """Until nothing is loaded or computed any more."""
        self.step_until(lambda: not self.loads.num_transfers)
        self.run()

    def settle(self) -> None:
        """Until all of it is stored, too."""
        self.compute()
        assert self.chain.drain(timeout_s=20)

    def key(self, tokens: list[int], chunk: int) -> PartKey:
        """Of the one part that a chunk of these tokens has."""
        assert self.tiers is not None
        chain = HashChain(root_hash(FINGERPRINT), self.tiers.kv.chunks.layout)
        chain.extend(tokens)
        units_per_chunk = CHUNK_TOKENS // self.tiers.kv.chunks.layout.hash_unit_tokens
        return self.tiers.kv.record(chain.unit_hashes[(chunk + 1) * units_per_chunk - 1]).keys[0]

    def counts(self, name: str) -> dict[str, int]:
        return next(tier.counts for tier in self.chain.stats().tiers if tier.name == name)

    def check(self) -> None:
        """Nothing is held, and no integrity is lost."""
        self.check_empty()
        self.engine.load.check_integrity()
