"""The links from this engine to the pools of its sources: one per peer, over the first connector that works.

A peer that announces a new epoch has restarted: its old link is closed, which tears down what was posted on it.
Knows nothing of tickets or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import KvRelayError, TransferError
from kvrelay_engine.messages import Event, PeerConnected, PeerFailed
from kvrelay_transfer.connectors.base import Connector, PeerInfo, PeerLink
from kvrelay_transfer.connectors.registry import choose
from kvrelay_transfer.layout import KvLayout


@dataclass(slots=True, eq=False)
class ActiveLink:
    peer: PeerInfo
    connector: str
    link: PeerLink
    is_announced: bool = False  # PeerConnected was sent, the probe being over


class PeerLinks:
    def __init__(self, layout: KvLayout, connectors: Mapping[str, Connector], emit: Callable[[Event], None]) -> None:
        """`connectors` in order of preference."""
        self._layout = layout
        self._connectors = connectors
        self._emit = emit
        self._links: dict[str, ActiveLink] = {}
        self._errors: dict[str, KvRelayError] = {}  # why the last attempt to connect failed

    def connect(self, peer: PeerInfo) -> None:
        """Answered by PeerConnected, when the link's probe is over, or PeerFailed."""
        known = self._links.get(peer.peer_id)
        if known is not None and known.peer == peer:
            known.is_announced = False
            return
        self.disconnect(peer.peer_id)
        try:
            self._layout.check_compatible(peer.layout)
            self._links[peer.peer_id] = self._open(peer)
        except KvRelayError as error:
            self._fail(peer.peer_id, error)

    def disconnect(self, peer_id: str) -> None:
        self._errors.pop(peer_id, None)
        active = self._links.pop(peer_id, None)
        if active is not None:
            active.link.close()

    def tear_down(self, peer_id: str, error: KvRelayError) -> None:
        """Closes a link that does not progress; its transfers become terminal."""
        if peer_id in self._links:
            self.disconnect(peer_id)
            self._fail(peer_id, error)

    def find(self, peer_id: str, engine_epoch: bytes) -> ActiveLink | None:
        """None while the peer is not connected in this epoch. Raises what the last attempt failed with."""
        active = self._links.get(peer_id)
        if active is not None and active.peer.engine_epoch == engine_epoch:
            return active
        if peer_id in self._errors:
            raise self._errors[peer_id]
        return None

    @property
    def is_probing(self) -> bool:
        return any(not active.is_announced for active in self._links.values())

    def poll(self) -> None:
        for peer_id, active in self._links.items():
            gb_per_s = None if active.is_announced else active.link.probed_gb_per_s()
            if gb_per_s is not None:
                active.is_announced = True
                self._emit(PeerConnected(peer_id, active.connector, gb_per_s))

    def close(self) -> None:
        for peer_id in list(self._links):
            self.disconnect(peer_id)

    def _open(self, peer: PeerInfo) -> ActiveLink:
        refusals: list[str] = []
        needs_slices = self._layout.needs_slices(peer.layout)
        for connector, offer in choose(peer.offers, self._connectors):
            if needs_slices and not connector.can_slice:
                refusals.append(f"{connector.name}: moves whole blocks only, {self._difference(peer.layout)}")
                continue
            try:
                return ActiveLink(peer, connector.name, connector.connect(peer, offer))
            except TransferError as error:
                refusals.append(f"{connector.name}: {error.message}")
        ours = ", ".join(self._connectors) or "none"
        theirs = ", ".join(offer.name for offer in peer.offers) or "none"
        details = "; ".join(refusals) or f"no connector in common (ours: {ours}; the peer's: {theirs})"
        raise TransferError(f"the KV pool of {peer.peer_id} cannot be reached: {details}")

    def _difference(self, theirs: KvLayout) -> str:
        ours = self._layout
        return (
            f"and those of the source have {theirs.block_tokens} tokens of {theirs.num_kv_heads} KV heads, ours "
            f"{ours.block_tokens} of {ours.num_kv_heads}: use one --block-tokens, or allow another --connector"
        )

    def _fail(self, peer_id: str, error: KvRelayError) -> None:
        self._errors[peer_id] = error
        self._emit(PeerFailed(peer_id, info_of(error)))
