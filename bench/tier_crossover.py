"""Where loading KV beats computing it: the store's seconds for a prompt beside those of a model's prefill.

The model is the one of `relay.py`, run by `ModelRunner` on the CPU. Loading is a fetch from a chain of tiers: looked
up, got, verified, kept in host memory and copied to its blocks in the pool.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoints import make_checkpoint
from model_rig import ModelRig
from relay import SHAPE, make_prompts

from kvrelay_core.clock import MonotonicClock
from kvrelay_engine.loader import load_model
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.naps import nap
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.part_store import PartStore
from kvrelay_transfer.tiers.records import Record, RecordDestination
from kvrelay_transfer.tiers.tier import Tier

CHUNK_TOKENS = 512
TRIES = 2
# Layers, KV heads, head size: from their published configurations. In 16 bits.
MODELS = {
    "Qwen2.5-0.5B": (24, 2, 64),
    "Qwen2.5-VL-7B": (28, 4, 128),
    "Qwen3-30B-A3B": (48, 4, 128),
    "Llama-3.1-8B": (32, 8, 128),
    "Llama-3.1-70B": (80, 8, 128),
}


def token_bytes(model: str) -> int:
    layers, kv_heads, head_size = MODELS[model]
    return layers * 2 * kv_heads * head_size * 2


def prefill_seconds(prompt_tokens: Sequence[int]) -> tuple[dict[int, float], KvLayout]:
    """Of prompts of so many tokens, the best of some tries, which flatters computing; and the layout of their KV."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        path = make_checkpoint(Path(folder) / "model", num_kv_heads=4, **SHAPE)
        rig = ModelRig(load_model(str(path), "float32", "cpu"), num_blocks=max(prompt_tokens) // 16 + 8)
    free = list(rig.free_blocks)
    seconds: dict[int, float] = {}
    for count in sorted(prompt_tokens) * TRIES:
        rig.free_blocks[:] = free
        sequence = rig.add(make_prompts(1, count, seed=count)[0], 1)
        started_s = time.perf_counter()
        while not sequence.generated:
            rig.step([sequence], CHUNK_TOKENS)
        seconds[count] = min(seconds.get(count, math.inf), time.perf_counter() - started_s)
    return seconds, rig.layouts[0]


class ChainLoads:
    """The KV of prompts in a chain of host memory and, if there is one, a store below it."""

    def __init__(self, layout: KvLayout, num_tokens: int, store: PartStore | None) -> None:
        num_blocks = num_tokens // layout.block_tokens
        self._memory = PoolMemory.allocate(layout, 2 * num_blocks, "cpu", os.urandom(16))
        self._memory.block_rows[:num_blocks].random_(0, 100)
        chunks = KvChunks.of(layout)
        self.chunk_tokens = chunks.chunk_tokens
        self._records = KvRecords(self._memory, chunks, KeyMaker((b"bench chain",)))
        room_bytes = 2 * num_blocks * layout.block_bytes
        self._host = HostStore(HostSlab(room_bytes, max(chunks.part_bytes)))
        self._clock = MonotonicClock()
        self._chain = TierChain(self._host, [Tier(store, self._clock)] if store is not None else [], clock=self._clock)
        self._blocks = [
            range(first, first + chunks.num_blocks) for first in range(0, num_blocks, chunks.num_blocks)
        ]  # of each chunk; the pool's other half is where they are loaded to
        self._store_all(num_blocks)

    def load_s(self, num_tokens: int) -> float:
        """Seconds until the first so many tokens are in the pool."""
        records = [self._record(index) for index in range(num_tokens // self.chunk_tokens)]
        started_s = time.perf_counter()
        fetch = self._chain.fetch(records, self._take_room, self._clock.now() + 60, lambda count, seconds: True)
        while not fetch.is_terminal:
            fetch.poll()
            nap()
        seconds = time.perf_counter() - started_s
        assert fetch.num_loaded == len(records)
        return seconds

    def forget(self) -> None:
        """What host memory has."""
        self._host.clear()

    def close(self) -> None:
        self._chain.close()

    def _store_all(self, num_blocks: int) -> None:
        for index, blocks in enumerate(self._blocks):
            assert self._chain.offer(self._record(index), self._records.source(blocks))
        assert self._chain.drain(60)
        self.load_s(num_blocks * self._memory.layout.block_tokens)
        rows = self._memory.block_rows
        assert torch.equal(rows[:num_blocks], rows[num_blocks:]), "what is loaded is what was stored"

    def _record(self, index: int) -> Record:
        return self._records.record(index.to_bytes(8, "little"))

    def _take_room(self, first: int, end: int) -> list[RecordDestination] | None:
        offset = self._memory.num_blocks // 2
        return [self._records.destination([offset + block for block in blocks]) for blocks in self._blocks[first:end]]


def prefill_speeds(gb_per_s: float) -> dict[str, float]:
    """For each model, the tokens per second up to which computing is slower than loading."""
    return {model: gb_per_s * 1e9 / token_bytes(model) for model in MODELS}
