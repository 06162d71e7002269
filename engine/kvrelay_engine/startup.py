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
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.engine import Engine
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.kv_group import KvGroup
from kvrelay_engine.kv_startup import StartedKv, build_kv
from kvrelay_engine.loader import load_model
from kvrelay_engine.media_startup import build_media, media_traits
from kvrelay_engine.messages import Event, Started
from kvrelay_engine.model_runner import ModelRunner
from kvrelay_engine.models.layers.linear import linear_for_prompts, linear_for_tokens
from kvrelay_engine.tier_startup import build_tiers
from kvrelay_engine.warm_up import warm_up
from kvrelay_transfer.connectors.base import ConnectorOffer, PoolOffer
from kvrelay_transfer.ticket import TicketSigner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartedEngine:
    engine: Engine
    started: Started


def build_engine(config: EngineConfig, clock: Clock, emit: Callable[[Event], None], stack: ExitStack) -> StartedEngine:
    """What has to be closed at the end is entered into `stack`. Raises ConfigError."""
    torch.set_num_threads(config.num_threads)
    Path(config.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    make_current(torch.device(config.device))
    loaded = load_model(
        config.model,
        config.dtype,
        config.device,
        max_model_len=config.max_model_len,
        make_linear=linear_for_prompts if config.role == "prefill" else linear_for_tokens,
    )
    epoch = secrets.token_bytes(16)
    kv = build_kv(config, loaded, epoch, clock, emit, stack)
    full = kv.groups[0]
    media = build_media(config, loaded, kv.slots, clock, emit, stack)
    pools = [memory.tensor for memory in kv.memories]
    parts = EngineParts(
        runner=ModelRunner(loaded, pools, [group.layout for group in kv.groups]),
        pool=full.pool,
        layout=full.layout,
        max_model_len=loaded.config.max_model_len,
        identity=EngineIdentity(config.worker_id, config.address, epoch, loaded.fingerprint),
        signer=TicketSigner(secrets.token_bytes(32), epoch),
        connectors=full.connectors,
        clock=clock,
        emit=emit,
        staging=full.staging,
        digester=full.digester,
        sliding=kv.sliding,
        device=kv.memories[0].device,
        media=media,
        tiers=build_tiers(config.tiers, kv, loaded.fingerprint, clock, stack),
        synchronize=_synchronizer(loaded.device),
    )
    engine = Engine(config, parts)
    started_s = clock.now()
    warm_up(
        parts.runner,
        pools,
        block_tokens=full.layout.block_tokens,
        max_tokens=min(config.tokens_per_step, engine.max_model_len),
        max_num_seqs=config.max_num_seqs,
        synchronize=parts.synchronize,
        media=media_traits(loaded.config) if config.role == "prefill" else None,
    )
    logger.info("warmed up in %.2f s", clock.now() - started_s)
    return StartedEngine(engine, _describe(config, engine, parts, kv))


def make_current(device: torch.device) -> None:
    """Triton launches on the current device, whatever its tensors are on."""
    if device.type == "cuda" and device.index is not None and device.index < torch.cuda.device_count():
        torch.cuda.set_device(device)  # one that does not exist is the loader's to refuse


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return torch.cuda.current_stream(device).synchronize
    return lambda: None


def _describe(config: EngineConfig, engine: Engine, parts: EngineParts, kv: StartedKv) -> Started:
    return Started(
        engine_epoch=parts.identity.engine_epoch,
        model_fingerprint=parts.identity.model_fingerprint,
        layout=parts.layout,
        num_blocks=parts.pool.num_blocks,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.tokens_per_step,
        vocab_size=parts.runner.vocab_size,
        offers=offers_of(kv.groups[0]),
        more_pools=tuple(PoolOffer(group.layout, offers_of(group)) for group in kv.groups[1:]),
        device=device_name(config.device),
        decode_alone_tokens=config.decode_alone_tokens,
        staging_fd_path=kv.slots.fd_path,
        staging_slots=kv.slots.num_slots,
        staging_slot_bytes=kv.slots.slot_bytes,
        embedding_layout=parts.media.layout,
    )


def offers_of(group: KvGroup) -> tuple[ConnectorOffer, ...]:
    offers = (connector.offer() for connector in group.connectors.values())
    return tuple(offer for offer in offers if offer is not None)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({os.cpu_count()} cores)"
