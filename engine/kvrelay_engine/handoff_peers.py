"""The links from this engine to the pools of its sources: one per peer, over the first connector that works.

A connector whose reads keep failing is left for the next one that connects, and tried again after a rest
(`link_health`). The link that was left stays open until what was posted on it has ended. A peer that announces a new
epoch has restarted: its old link is closed, which tears down what was posted on it, and what was known of it is
forgotten; one that only was away goes on where it was. Knows nothing of tickets or requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import KvRelayError, TransferError
from kvrelay_engine.link_health import LONGEST_REST_S, LinkHealth
from kvrelay_engine.link_reads import LinkRead
from kvrelay_engine.link_records import LinkRecord, LinkRecords
from kvrelay_engine.load_messages import LinkLoad
from kvrelay_engine.messages import Event, PeerConnected, PeerFailed
from kvrelay_transfer.connectors.base import BlockRead, Connector, PeerInfo, PeerLink
from kvrelay_transfer.connectors.registry import choose
from kvrelay_transfer.embedding_layout import PoolLayout

log = logging.getLogger(__name__)

# Longer than any connector's deadline of a read.
LEFT_OPEN_S = 60.0


@dataclass(slots=True, eq=False)
class ActiveLink:
    peer: PeerInfo
    connector: str
    link: PeerLink
    record: LinkRecord
    clock: Clock
    note: Callable[[str, str, KvRelayError | None], None]  # peer, connector, how a read ended
    is_announced: bool = False  # PeerConnected was sent, the probe being over
    is_closed: bool = False
    num_reads: int = 0  # under way

    def read(self, read: BlockRead) -> LinkRead:
        """Posts a read that is counted. How it ends may change the link of the pair, when it is polled."""
        transfer = self.link.read(read)
        self.num_reads += 1
        return LinkRead(transfer, read, self, self.peer.layout.block_bytes, self.record.stats, self.clock)

    def note_read(self, error: KvRelayError | None) -> None:
        self.note(self.peer.peer_id, self.connector, error)

    def note_end(self) -> None:
        self.num_reads -= 1

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.link.close()

    def judge(self) -> None:
        """Takes up what the probe found, when it is over."""
        if self.record.speed is None or not self.record.is_judged:
            self.record.judge(self.link.probed_speed())


class PeerLinks:
    def __init__(
        self,
        layout: PoolLayout,
        connectors: Mapping[str, Connector],
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        device: str = "cpu",
    ) -> None:
        """`connectors` in order of preference; `device` is the kind that our pool is on."""
        self._layout = layout
        self._connectors = connectors
        self._emit = emit
        self._clock = clock
        self._health = LinkHealth(clock)
        self.records = LinkRecords(clock, device)
        self._links: dict[str, ActiveLink] = {}
        self._left: list[tuple[float, ActiveLink]] = []  # when to close it at the latest
        self._epochs: dict[str, bytes] = {}  # of the start that health and records are of
        self._gone_at_s: dict[str, float] = {}
        self.fallbacks = 0
        self.failed_reads = 0
        self._errors: dict[str, KvRelayError] = {}  # why the last attempt to connect failed

    def connect(self, peer: PeerInfo) -> None:
        """Answered by PeerConnected, when the link's probe is over, or PeerFailed."""
        known = self._links.get(peer.peer_id)
        if known is not None and known.peer == peer:
            known.is_announced = False
            return
        self.disconnect(peer.peer_id)
        if self._epochs.get(peer.peer_id) != peer.engine_epoch:
            self._forget(peer.peer_id)
        self._epochs[peer.peer_id] = peer.engine_epoch
        try:
            self._layout.check_compatible(peer.layout)
            self._links[peer.peer_id] = self._open_any(peer)
            self._gone_at_s.pop(peer.peer_id, None)
        except KvRelayError as error:
            self._fail(peer.peer_id, error)

    def refuse(self, peer_id: str, error: KvRelayError) -> None:
        """The peer has no pool that ours could be read from. Answered by PeerFailed."""
        self.disconnect(peer_id)
        self._fail(peer_id, error)

    def disconnect(self, peer_id: str) -> None:
        """What is known of its links is kept for a while: it may come back."""
        self._errors.pop(peer_id, None)
        self._gone_at_s.setdefault(peer_id, self._clock.now())
        active = self._links.pop(peer_id, None)
        if active is not None:
            active.close()
        for _, left in [entry for entry in self._left if entry[1].peer.peer_id == peer_id]:
            left.close()
        self._left = [entry for entry in self._left if entry[1].peer.peer_id != peer_id]

    def tear_down(self, peer_id: str, connector: str) -> None:
        """Closes what does not progress, which speaks against the connector; its transfers become terminal, at once or
        when the connector can. Links over other connectors stay."""
        active = self._links.get(peer_id)
        if active is not None and active.connector == connector:
            self._health.note_failure(peer_id, connector)
            self.disconnect(peer_id)
            self._fail(peer_id, TransferError(f"too many reads from {peer_id} were given up unfinished"))
            return
        for _, left in self._left:
            if (left.peer.peer_id, left.connector) == (peer_id, connector):
                left.close()

    def find(self, peer_id: str, engine_epoch: bytes) -> ActiveLink | None:
        """None while the peer is not connected in this epoch. Raises what the last attempt failed with."""
        active = self._links.get(peer_id)
        if active is not None and active.peer.engine_epoch == engine_epoch:
            return self._best(active)
        if peer_id in self._errors:
            raise self._errors[peer_id]
        return None

    def note_read(self, peer_id: str, connector: str, error: KvRelayError | None) -> None:
        """A read of the peer over `connector` came, or failed through a fault of the way. The link may be another one
        afterwards."""
        if error is None:
            self._health.note_success(peer_id, connector)
            return
        self.failed_reads += 1
        if self._health.note_failure(peer_id, connector):
            self._leave(peer_id, connector)

    def distrust(self, peer_id: str, connector: str) -> None:
        """What came over the connector is not what was sent: it is left at once, where there is another."""
        self.failed_reads += 1
        self._health.rest(peer_id, connector)
        self._leave(peer_id, connector)

    @property
    def is_probing(self) -> bool:
        return any(not active.is_announced for active in self._links.values())

    def poll(self) -> None:
        for peer_id, active in self._links.items():
            active.judge()
            if not active.is_announced and (speed := active.record.speed) is not None:
                active.is_announced = True
                self._emit(PeerConnected(peer_id, active.connector, speed.gb_per_s, speed.latency_s))
        self._close_left()
        for peer_id in [peer_id for peer_id, gone_at_s in self._gone_at_s.items() if self._is_long_ago(gone_at_s)]:
            self._forget(peer_id)

    def load(self) -> tuple[LinkLoad, ...]:
        return self.records.links({peer_id: active.connector for peer_id, active in self._links.items()})

    def close(self) -> None:
        for peer_id in list(self._links):
            self.disconnect(peer_id)

    def _best(self, active: ActiveLink) -> ActiveLink:
        """The pair's link, or one over a better connector that has rested long enough."""
        offered = [connector.name for connector, _ in choose(active.peer.offers, self._connectors)]
        better = offered[: offered.index(active.connector)] if active.connector in offered else []
        rested = [name for name in better if self._health.has_rested(active.peer.peer_id, name)]
        if not rested:
            return active
        for name in rested:
            self._health.try_again(active.peer.peer_id, name)
        try:
            other = self._open(active.peer)
        except TransferError:
            other = active
        for name in rested[: rested.index(other.connector)] if other.connector in rested else rested:
            self._health.rest(active.peer.peer_id, name)  # it does not even connect
        if other.connector == active.connector:
            if other is not active:
                other.close()
            return active
        log.info("reads from %s go by %s again", active.peer.peer_id, other.connector)
        self._replace(active, other)
        return other

    def _leave(self, peer_id: str, connector: str) -> None:
        """For the next connector that connects; where there is none, the link stays as it is."""
        active = self._links.get(peer_id)
        if active is None or active.connector != connector:
            return
        try:
            other = self._open(active.peer)
        except TransferError as error:
            self._health.stay(peer_id, connector)
            log.warning("reads from %s by %s fail, and there is no other way: %s", peer_id, connector, error.message)
            return
        log.warning("reads from %s by %s fail; they go by %s now", peer_id, connector, other.connector)
        self._replace(active, other)
        self.records.note_fallback(peer_id, connector)
        self.fallbacks += 1

    def _replace(self, active: ActiveLink, other: ActiveLink) -> None:
        self._links[active.peer.peer_id] = other
        self._left.append((self._clock.now() + LEFT_OPEN_S, active))

    def _close_left(self) -> None:
        """What was left, once nothing is under way on it, or is to be waited for any longer."""
        still_left = []
        for close_at_s, left in self._left:
            if left.num_reads and self._clock.now() < close_at_s:
                still_left.append((close_at_s, left))
            else:
                left.close()
        self._left = still_left

    def _is_long_ago(self, gone_at_s: float) -> bool:
        """Whatever rested then has rested by now."""
        return self._clock.now() - gone_at_s >= LONGEST_REST_S

    def _forget(self, peer_id: str) -> None:
        self._health.forget(peer_id)
        self.records.forget(peer_id)
        self._epochs.pop(peer_id, None)
        self._gone_at_s.pop(peer_id, None)

    def _open_any(self, peer: PeerInfo) -> ActiveLink:
        """Over one that rests as well, where no other connects."""
        try:
            return self._open(peer)
        except TransferError:
            if not self._health.end_rests(peer.peer_id):
                raise
        return self._open(peer)

    def _open(self, peer: PeerInfo) -> ActiveLink:
        refusals: list[str] = []
        needs_slices = self._layout.needs_slices(peer.layout)
        for connector, offer in choose(peer.offers, self._connectors):
            if self._health.rests(peer.peer_id, connector.name):
                refusals.append(f"{connector.name}: its reads failed, it is left alone for a while")
                continue
            if needs_slices and not connector.can_slice:
                refusals.append(f"{connector.name}: moves whole blocks only, {self._difference(peer.layout)}")
                continue
            try:
                link = connector.connect(peer, offer)
            except TransferError as error:
                refusals.append(f"{connector.name}: {error.message}")
                continue
            if self._health.has_rested(peer.peer_id, connector.name):
                self._health.try_again(peer.peer_id, connector.name)
            record = self.records.find(peer.peer_id, connector.name)
            record.speed = None  # this link's own probe is still to come
            return ActiveLink(peer, connector.name, link, record, self._clock, self.note_read)
        ours = ", ".join(self._connectors) or "none"
        theirs = ", ".join(offer.name for offer in peer.offers) or "none"
        details = "; ".join(refusals) or f"no connector in common (ours: {ours}; the peer's: {theirs})"
        raise TransferError(f"the KV pool of {peer.peer_id} cannot be reached: {details}")

    def _difference(self, theirs: PoolLayout) -> str:
        return (
            f"and those of the source have {theirs.block_text}, ours {self._layout.block_text}: "
            "use one --block-tokens, or allow another --connector"
        )

    def _fail(self, peer_id: str, error: KvRelayError) -> None:
        self._errors[peer_id] = error
        self._emit(PeerFailed(peer_id, info_of(error)))
