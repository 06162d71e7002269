"""Puts the KV groups of an engine together: how many blocks each has, their pools and connectors, the staging ring.

Everything that can be wrong with flags or memory comes out of here as a ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch

from kvrelay_core.clock import Clock
from kvrelay_core.errors import ConfigError
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.kv_group import FIRST_SLIDING_READ, SLIDING_GROUP, KvGroup
from kvrelay_engine.loader import LoadedModel
from kvrelay_engine.messages import Event
from kvrelay_engine.sizing import MemoryShare, total_bytes
from kvrelay_engine.sliding_blocks import most_in_ticket, most_while_computing, most_while_decoding
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.connectors.registry import create_connectors
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots

# Of the device's memory, when nothing is said: a CPU's is shared with another worker and everybody else.
DEFAULT_FRACTION = {"cpu": 0.3, "cuda": 0.85}
# What a process takes before it has loaded anything: libraries, and on a GPU the context and workspaces.
RUNTIME_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, slots=True)
class StartedKv:
    memories: tuple[PoolMemory, ...]  # of each group
    groups: tuple[KvGroup, ...]
    slots: StagingSlots

    @property
    def sliding(self) -> KvGroup | None:
        return self.groups[SLIDING_GROUP] if len(self.groups) > 1 else None


def build_kv(
    config: EngineConfig,
    loaded: LoadedModel,
    epoch: bytes,
    clock: Clock,
    emit: Callable[[Event], None],
    stack: ExitStack,
) -> StartedKv:
    """What has to be closed at the end is entered into `stack`. Raises ConfigError."""
    layouts = loaded.kv_layouts(config.block_tokens, config.hash_unit_tokens)
    memories = []
    for layout, num_blocks in zip(layouts, count_blocks(config, loaded, layouts), strict=True):
        memories.append(PoolMemory.allocate(layout, num_blocks, config.device, epoch))
        stack.callback(memories[-1].close)
    slots = StagingSlots.create(config.staging_slots, max(map(slot_bytes_for, layouts)))
    stack.callback(slots.close)
    groups = []
    for index, memory in enumerate(memories):
        staging = BlockStaging(memory, slots)
        stack.callback(staging.close)
        groups.append(
            KvGroup(
                index=index,
                pool=BlockPool(memory.num_blocks, memory.words),
                layout=layouts[index],
                connectors=_connect(config, index, memory, staging, clock, emit, stack),
                staging=staging,
                digester=BlockDigester(memory, config.digest_share),
            )
        )
    return StartedKv(tuple(memories), tuple(groups), slots)


def _connect(
    config: EngineConfig,
    group: int,
    memory: PoolMemory,
    staging: BlockStaging,
    clock: Clock,
    emit: Callable[[Event], None],
    stack: ExitStack,
) -> dict[str, Connector]:
    connectors = create_connectors(
        config.connectors,
        memory=memory,
        run_dir=Path(config.run_dir),
        worker_id=f"{config.worker_id}.sliding" if group else config.worker_id,
        staging=staging,
        socket_half=EmittedFetches(emit),
        clock=clock,
        first_read_id=FIRST_SLIDING_READ if group else 1,
    )
    for connector in connectors.values():
        stack.callback(connector.close)
    return connectors


# ------------------------------------------------------------------------------------------------- sizes


def count_blocks(config: EngineConfig, loaded: LoadedModel, layouts: tuple[KvLayout, ...]) -> tuple[int, ...]:
    """Of each group: as many as were asked for; else as the worker's share of memory holds, but no more than all seats
    can use. `kv_blocks` is what the full group has; the other one never needs more."""
    max_model_len = loaded.config.max_model_len
    useful = config.max_num_seqs * layouts[0].blocks_for(max_model_len) + 1
    if len(layouts) == 1:
        return (config.kv_blocks or min(useful, _share(config, loaded).blocks_of(layouts[0])),)
    full, sliding = layouts
    if config.kv_blocks is not None:
        num_sliding = min(config.kv_blocks, sliding_blocks_for(config, sliding, config.max_num_seqs))
        return config.kv_blocks, config.sliding_blocks or num_sliding
    size_bytes = _share(config, loaded).bytes_for(full.block_bytes + sliding.block_bytes)
    if config.sliding_blocks is None:
        num_full, num_sliding = split_bytes(size_bytes, config, full, sliding, max_model_len)
        return min(useful, num_full), num_sliding
    num_full = (size_bytes - config.sliding_blocks * sliding.block_bytes) // full.block_bytes
    if num_full < 2:
        raise ConfigError(f"sliding_blocks {config.sliding_blocks} leave no room for others", field="sliding_blocks")
    return min(useful, num_full), config.sliding_blocks


def split_bytes(
    size_bytes: int, config: EngineConfig, full: KvLayout, sliding: KvLayout, max_model_len: int
) -> tuple[int, int]:
    """Blocks of the full and the sliding group that these bytes hold, at least two of each.

    Both groups are full at once when sequences are of a middle length, between what the sliding group keeps of one
    and the longest that there may be. With shorter ones the sliding group is full first, with longer ones the other.
    """
    kept_tokens = sliding.window + config.tokens_per_step
    middle_len = min(max_model_len, isqrt(kept_tokens * max_model_len))
    each = sliding_blocks_for(config, sliding, 1) - 1
    sequence_bytes = full.blocks_for(middle_len) * full.block_bytes + each * sliding.block_bytes
    num_seqs = min(config.max_num_seqs, max(1, size_bytes // sequence_bytes))
    num_sliding = min(
        sliding_blocks_for(config, sliding, num_seqs), size_bytes // (full.block_bytes + sliding.block_bytes)
    )
    return (size_bytes - num_sliding * sliding.block_bytes) // full.block_bytes, num_sliding


def sliding_blocks_for(config: EngineConfig, layout: KvLayout, num_seqs: int) -> int:
    """With the null block. Prefill computes each of the sequences, and keeps what its ticket names; decode computes one
    of them at the most, and tokens of the others."""
    computing = most_while_computing(layout, config.tokens_per_step)
    if config.role == "prefill":
        return num_seqs * (computing + most_in_ticket(layout)) + 1
    return computing + num_seqs * most_while_decoding(layout) + 1


def _share(config: EngineConfig, loaded: LoadedModel) -> MemoryShare:
    device: torch.device = loaded.device
    activations = loaded.config.activation_bytes(
        config.tokens_per_step, config.max_num_seqs, ELEMENT_BYTES[loaded.dtype]
    )
    return MemoryShare(
        fraction=config.memory_fraction or DEFAULT_FRACTION[device.type],
        total=total_bytes(device),
        weights=loaded.weight_bytes,
        activations=RUNTIME_BYTES[device.type] + activations,
    )
