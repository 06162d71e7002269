"""The sources that this worker may read from: who is allowed, the handshake, and what becomes of a lost one.

Registered sources are connected in the background as soon as the engine has started, so that no request waits for
it, and again whenever they are back; others with their first ticket.

Memory handles come from the handshake alone, never from a ticket (PROTOCOL D1). One handshake per (address, epoch);
a peer that restarted gets a new one, and the engine drops its link to the old pool. A peer that stays away is
disconnected within about 2 s of being noticed, so that its memory is not held (PROTOCOL E1).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import grpc

from kvrelay.v1 import common_pb2, kv_source_pb2_grpc
from kvrelay_core.errors import (
    KvRelayError,
    MismatchError,
    TicketRejectedError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.exposure import is_loopback
from kvrelay_engine.messages import ConnectPeer, DisconnectPeer, PeerConnected, PeerFailed, Started
from kvrelay_transfer.connectors.base import PeerInfo
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import Ticket
from kvrelay_worker.embedding_wire import connect_to_wire, peer_from_wire
from kvrelay_worker.peer_errors import peer_errors
from kvrelay_worker.wire import offer_to_wire
from kvrelay_worker.worker import Worker

log = logging.getLogger(__name__)

# Between handshakes with a registered source that answers but cannot be connected.
LOADING_PAUSE_S = 0.2  # its engine is still starting
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # anything else, doubling


@dataclass(eq=False)
class _Peer:
    address: str
    channel: grpc.aio.Channel
    stub: kv_source_pb2_grpc.KvSourceServiceAsyncStub
    info: PeerInfo | None = None  # of the latest handshake that the engine was told of
    reported: str = ""  # why it is not connected, as the log has it already
    handshake: asyncio.Lock = field(default_factory=asyncio.Lock)
    watch: asyncio.Task[None] | None = None


class PeerBook:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._allowed = frozenset(worker.config.peers)
        self._peers: dict[str, _Peer] = {}
        worker.engine.on(Started, lambda _: self._add_registered())
        worker.engine.on(PeerConnected, _log_connected)
        worker.engine.on(PeerFailed, self._on_failed)

    def __len__(self) -> int:
        return len(self._peers)

    # ------------------------------------------------------------------------------------------- allowed

    def check_allowed(self, address: str) -> None:
        """Raises TicketRejectedError unless the address is a registered source (without a list: on loopback)."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not port.isdecimal() or not host:
            raise TicketRejectedError(f"the ticket's source {address!r} is not host:port", cause="source")
        listed = address in self._allowed or host in self._allowed
        if not listed and (self._allowed or not is_loopback(host)):
            raise TicketRejectedError(
                f"{address} is not a registered source of this worker; add it to its peers", cause="source"
            )

    # --------------------------------------------------------------------------------------------- connect

    def stub(self, address: str) -> kv_source_pb2_grpc.KvSourceServiceAsyncStub:
        """Of a connected peer. Raises WorkerLostError."""
        peer = self._peers.get(address)
        if peer is None or peer.info is None:
            raise WorkerLostError(f"{address} is not connected any more", peer=address)
        return peer.stub

    async def connect(self, ticket: Ticket) -> kv_source_pb2_grpc.KvSourceServiceAsyncStub:
        """Makes sure that the engine knows the ticket's source as it runs now.

        Raises TicketRejectedError for a source that is not allowed or has restarted since it issued the ticket,
        MismatchError for another model or layout, WorkerLostError for an unreachable one.
        """
        address = ticket.source_address
        self.check_allowed(address)
        peer = self._peers.get(address) or self._add(address)
        async with peer.handshake:
            if peer.info is None or peer.info.engine_epoch != ticket.engine_epoch:
                await self._shake_hands(peer)
        info = peer.info
        if info is None or info.engine_epoch != ticket.engine_epoch:
            raise TicketRejectedError(
                f"{address} has restarted since it issued the ticket; prefill again", cause="epoch"
            )
        return peer.stub

    async def reach(self, address: str) -> tuple[kv_source_pb2_grpc.KvSourceServiceAsyncStub, PeerInfo]:
        """A source as it runs now, which the engine knows of. Raises as `connect`, but for no epoch."""
        self.check_allowed(address)
        peer = self._peers.get(address) or self._add(address)
        async with peer.handshake:
            if peer.info is None:
                await self._shake_hands(peer)
            if peer.info is None:
                raise WorkerLostError(f"{address} is not connected any more", peer=address)
            return peer.stub, peer.info

    def _add_registered(self) -> None:
        for address in sorted(self._allowed):
            if _is_dialable(address):
                self._add(address)

    def _add(self, address: str) -> _Peer:
        channel = open_channel(address, self._worker.config.tls)
        peer = _Peer(address, channel, kv_source_pb2_grpc.KvSourceServiceStub(channel))
        self._peers[address] = peer
        peer.watch = self._worker.tasks.spawn(self._watch(peer), f"watch {address}")
        return peer

    async def _shake_hands(self, peer: _Peer) -> None:
        started = self._worker.engine.started
        reader = common_pb2.WorkerRef(worker_id=self._worker.config.worker_id, address=self._worker.address)
        request = connect_to_wire(reader, list(map(offer_to_wire, started.offers)), started.layouts)
        timeout_s = self._worker.config.call_timeout_s
        with peer_errors(peer.address):
            response = await peer.stub.Connect(request, timeout=timeout_s, wait_for_ready=True)
        if self._peers.get(peer.address) is not peer:
            raise WorkerLostError(f"{peer.address} was given up during the handshake", peer=peer.address)
        info = peer_from_wire(peer.address, response)
        started.check_source(info.layouts)
        if isinstance(info.layout, KvLayout) and info.model_fingerprint != started.model_fingerprint:
            raise MismatchError(f"{peer.address} serves another model; start both workers with the same weights")
        self._register(peer, info)

    def _register(self, peer: _Peer, info: PeerInfo) -> None:
        if peer.info is not None and peer.info.engine_epoch == info.engine_epoch:
            return
        self._disconnect(peer)
        self._worker.engine.send(ConnectPeer(info))
        peer.info = info
        peer.reported = ""

    # ------------------------------------------------------------------------------------------------ loss

    def _disconnect(self, peer: _Peer) -> None:
        if peer.info is not None:
            peer.info = None
            self._worker.engine.notify(DisconnectPeer(peer.address))

    def _on_failed(self, event: PeerFailed) -> None:
        """The engine has no link any more: the next ticket of this peer begins with a handshake."""
        log.warning("link to %s failed: %s", event.peer_id, event.error.message)
        peer = self._peers.get(event.peer_id)
        if peer is not None:
            peer.info = None

    async def _watch(self, peer: _Peer) -> None:
        """For as long as the book has the peer."""
        while await self._wait_back(peer):
            if peer.info is not None:
                await self._recheck(peer)
            if peer.address in self._allowed:
                await self._introduce(peer)
            await peer.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        log.warning("source %s is gone", peer.address)
        self._drop(peer)
        await peer.channel.close()

    async def _wait_back(self, peer: _Peer) -> bool:
        """Until the peer can be reached. One that stays away for the grace is disconnected, and unless it is
        registered given up: False."""
        config = self._worker.config
        away_s = config.follow_grace_s if peer.info is not None else 2 * config.call_timeout_s
        try:
            async with asyncio.timeout(away_s):
                await _wait_ready(peer.channel)
        except TimeoutError:
            self._disconnect(peer)
            if peer.address not in self._allowed:
                return False
            self._report(peer, logging.WARNING, "cannot be reached; it is connected when it is up")
            await _wait_ready(peer.channel)
        return True

    async def _recheck(self, peer: _Peer) -> None:
        """The peer is back: is it still the one that we know?"""
        async with peer.handshake:
            try:
                await self._shake_hands(peer)
            except WorkerLostError:
                return  # away again: the grace begins anew
            except KvRelayError as error:
                self._report(peer, logging.WARNING, f"came back changed: {error.message}")
                self._disconnect(peer)

    async def _introduce(self, peer: _Peer) -> None:
        """Until the engine was told of the peer, be it by this or by a ticket."""
        pause_s = FIRST_PAUSE_S
        while True:
            await _wait_ready(peer.channel)
            try:
                async with peer.handshake:
                    if peer.info is None:
                        await self._shake_hands(peer)
                return
            except UnavailableError as error:
                self._report(peer, logging.INFO, error.message)
                await asyncio.sleep(LOADING_PAUSE_S)
            except KvRelayError as error:
                self._report(peer, logging.WARNING, error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _report(self, peer: _Peer, level: int, why: str) -> None:
        """Once for each reason in a row."""
        if peer.reported != why:
            peer.reported = why
            log.log(level, "source %s: %s", peer.address, why)

    def _drop(self, peer: _Peer) -> None:
        self._disconnect(peer)
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]

    async def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
            if peer.watch is not None:
                peer.watch.cancel()
                await asyncio.wait([peer.watch])
            await peer.channel.close()


async def _wait_ready(channel: grpc.aio.Channel) -> None:
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        await channel.wait_for_state_change(state)


def _is_dialable(address: str) -> bool:
    """False for a mere host, which may be listed as well."""
    host, _, port = address.rpartition(":")
    return port.isdecimal() and ((bool(host) and ":" not in host) or host.startswith("["))


def _log_connected(event: PeerConnected) -> None:
    if not event.gb_per_s:
        log.info("source %s: connector %s, not probed", event.peer_id, event.connector)
        return
    latency = f", {1e6 * event.latency_s:.0f} us" if event.latency_s else ""
    log.info("source %s: connector %s, %.1f GB/s%s", event.peer_id, event.connector, event.gb_per_s, latency)
