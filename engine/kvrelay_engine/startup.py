"""Puts a real engine together from its configuration: model, pool, connectors, staging ring.

Everything that can be wrong with flags, files or memory comes out of here as a ConfigError.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from kvrelay_core.clock import Clock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.engine import Engine
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.loader import LoadedModel, load_model
from kvrelay_engine.media_startup import build_media
from kvrelay_engine.messages import Event, Started
from kvrelay_engine.model_runner import ModelRunner
from kvrelay_engine.models.layers.linear import linear_for_prompts, linear_for_tokens
from kvrelay_engine.sizing import MemoryShare, total_bytes
from kvrelay_engine.warm_up import warm_up
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.connectors.registry import create_connectors
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import TicketSigner

logger = logging.getLogger(__name__)

# Of the device's memory, when nothing is said: a CPU's is shared with another worker and everybody else.
DEFAULT_FRACTION = {"cpu": 0.3, "cuda": 0.85}
# What a process takes before it has loaded anything: libraries, and on a GPU the context and workspaces.
RUNTIME_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, slots=True)
class StartedEngine:
    engine: Engine
    started: Started


def build_engine(config: EngineConfig, clock: Clock, emit: Callable[[Event], None], stack: ExitStack) -> StartedEngine:
    """What has to be closed at the end is entered into `stack`. Raises ConfigError."""
    torch.set_num_threads(config.num_threads)
    Path(config.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_current(torch.device(config.device))
    loaded = load_model(
        config.model,
        config.dtype,
        config.device,
        max_model_len=config.max_model_len,
        make_linear=linear_for_prompts if config.role == "prefill" else linear_for_tokens,
    )
    layout = loaded.kv_layout(config.block_tokens, config.hash_unit_tokens)
    epoch = secrets.token_bytes(16)
    memory = PoolMemory.allocate(layout, _count_blocks(config, loaded, layout), config.device, epoch)
    stack.callback(memory.close)
    slots = StagingSlots.create(config.staging_slots, slot_bytes_for(layout))
    stack.callback(slots.close)
    staging = BlockStaging(memory, slots)
    stack.callback(staging.close)
    connectors = _connect(config, memory, staging, clock, emit, stack)
    media = build_media(config, loaded, slots, clock, emit, stack)
    parts = EngineParts(
        runner=ModelRunner(loaded, memory.tensor, layout),
        pool=BlockPool(memory.num_blocks, memory.words),
        layout=layout,
        max_model_len=loaded.config.max_model_len,
        identity=EngineIdentity(config.worker_id, config.address, epoch, loaded.fingerprint),
        signer=TicketSigner(secrets.token_bytes(32), epoch),
        connectors=connectors,
        clock=clock,
        emit=emit,
        staging=staging,
        device=memory.device,
        media=media,
        synchronize=_synchronizer(loaded.device),
    )
    engine = Engine(config, parts)
    started_s = clock.now()
    warm_up(
        parts.runner,
        memory.tensor,
        block_tokens=layout.block_tokens,
        max_tokens=min(config.tokens_per_step, engine.max_model_len),
        max_num_seqs=config.max_num_seqs,
        synchronize=parts.synchronize,
    )
    logger.info("warmed up in %.2f s", clock.now() - started_s)
    return StartedEngine(engine, _describe(config, engine, parts, slots))


def _make_current(device: torch.device) -> None:
    """Triton launches on the current device, whatever its tensors are on."""
    if device.type == "cuda" and device.index is not None and device.index < torch.cuda.device_count():
        torch.cuda.set_device(device)  # one that does not exist is the loader's to refuse


def _count_blocks(config: EngineConfig, loaded: LoadedModel, layout: KvLayout) -> int:
    """As many as were asked for; else as the worker's share of memory holds, but no more than all seats can use."""
    if config.kv_blocks is not None:
        return config.kv_blocks
    model, device = loaded.config, loaded.device
    element_bytes = ELEMENT_BYTES[loaded.dtype]
    share = MemoryShare(
        fraction=config.memory_fraction or DEFAULT_FRACTION[device.type],
        total=total_bytes(device),
        weights=loaded.weight_bytes,
        activations=RUNTIME_BYTES[device.type]
        + model.activation_bytes(config.tokens_per_step, config.max_num_seqs, element_bytes),
    )
    useful = config.max_num_seqs * layout.blocks_for(model.max_model_len) + 1
    return min(useful, share.blocks_of(layout))


def _connect(
    config: EngineConfig,
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
        worker_id=config.worker_id,
        staging=staging,
        socket_half=EmittedFetches(emit),
        clock=clock,
    )
    for connector in connectors.values():
        stack.callback(connector.close)
    return connectors


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return torch.cuda.current_stream(device).synchronize
    return lambda: None


def _describe(config: EngineConfig, engine: Engine, parts: EngineParts, slots: StagingSlots) -> Started:
    offers = (connector.offer() for connector in parts.connectors.values())
    return Started(
        engine_epoch=parts.identity.engine_epoch,
        model_fingerprint=parts.identity.model_fingerprint,
        layout=parts.layout,
        num_blocks=parts.pool.num_blocks,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.tokens_per_step,
        vocab_size=parts.runner.vocab_size,
        offers=tuple(offer for offer in offers if offer is not None),
        device=device_name(config.device),
        decode_alone_tokens=config.decode_alone_tokens,
        staging_fd_path=slots.fd_path,
        staging_slots=slots.num_slots,
        staging_slot_bytes=slots.slot_bytes,
        embedding_layout=parts.media.layout,
    )


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({os.cpu_count()} cores)"
