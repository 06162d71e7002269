"""A KV group: layers that keep the same tokens, with a pool of their own and the ways by which peers read it.

Group 0 holds the layers that see the whole context; a model whose other layers see only the last tokens has those in
group 1 (ADR 0020). Knows no sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay_core.errors import TransferError
from kvrelay_engine.block_pool import BlockPool
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import Connector, ExportGate
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import Ticket

FULL_GROUP, SLIDING_GROUP = 0, 1

# Reads over the socket are numbered by the connectors of one engine; those of the sliding group begin here.
FIRST_SLIDING_READ = 1 << 39


class SlotWriter(Protocol):
    """The staging ring, as far as exports need it (`kvrelay_transfer.staging.BlockStaging`)."""

    def copy_out(self, blocks: tuple[int, ...], slot: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    index: int
    pool: BlockPool
    layout: KvLayout
    connectors: Mapping[str, Connector] = field(default_factory=dict)
    staging: SlotWriter | None = None
    digester: BlockDigester | None = None


class GroupGate:
    """Lets the readers of one group's pool have blocks of that group alone."""

    def __init__(self, gate: ExportGate, group: int) -> None:
        self._gate = gate
        self._group = group

    def check_export(self, ticket: Ticket, group: int, blocks: Sequence[int]) -> None:
        """As `ExportGate` says."""
        if group != self._group:
            raise TransferError(f"blocks of group {group} were asked for where group {self._group} is")
        self._gate.check_export(ticket, group, blocks)
