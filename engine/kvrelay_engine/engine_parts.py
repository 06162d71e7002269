"""What an engine is built from. `startup.py` makes the real parts, tests make small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvrelay_core.clock import Clock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.kv_group import KvGroup, SlotWriter
from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_engine.messages import Event
from kvrelay_engine.runner import Runner
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import TicketSigner


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is built from; `synchronize` returns when all work launched on the device is complete.

    `pool`, `layout`, `connectors`, `staging` and `digester` are those of the full group.
    """

    runner: Runner
    pool: BlockPool
    layout: KvLayout
    max_model_len: int
    identity: EngineIdentity
    signer: TicketSigner
    connectors: Mapping[str, Connector]
    clock: Clock
    emit: Callable[[Event], None]
    staging: SlotWriter | None = None
    digester: BlockDigester | None = None
    sliding: KvGroup | None = None  # of the layers that see the last tokens only, where there are both kinds
    device: str = "cpu"  # the kind that the pool is on
    media: EngineMedia = field(default_factory=EngineMedia)
    tiers: KvTiers | None = None  # of the full group; not where there is a sliding one
    synchronize: Callable[[], None] = lambda: None
