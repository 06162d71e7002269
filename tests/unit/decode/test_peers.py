"""Which sources a reader dials, one handshake per start of a source, and what a lost source leaves behind."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from fake_engine import LAYOUT, FakeEngine
from msgspec.structs import replace
from worker_rig import make_ticket, running_worker, wait_until

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    MismatchError,
    TicketRejectedError,
    TransferError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole
from kvrelay_worker.kv_source import KvSourceServicer


@pytest.mark.parametrize("address", ["10.1.2.3:80", "example.org:80", "nonsense", "127.0.0.1:", ":80", ""])
async def test_without_a_list_only_loopback_is_dialled(address: str) -> None:
    async with running_worker(DecodeRole) as reader:
        with pytest.raises(TicketRejectedError):
            reader.role.peers.check_allowed(address)
        for allowed in ("127.0.0.1:80", "[::1]:80", "localhost:80", "127.9.9.9:80"):
            reader.role.peers.check_allowed(allowed)


async def test_with_a_list_only_the_listed_are_dialled() -> None:
    async with running_worker(DecodeRole, peers=("127.0.0.1:1", "prefill")) as reader:
        for allowed in ("127.0.0.1:1", "prefill:80", "prefill:81"):
            reader.role.peers.check_allowed(allowed)
        for refused in ("127.0.0.1:2", "127.0.0.2:1", "10.0.0.2:80"):
            with pytest.raises(TicketRejectedError):
                reader.role.peers.check_allowed(refused)


async def test_many_tickets_of_one_start_need_one_handshake() -> None:
    async with running_worker(PrefillRole) as source, running_worker(DecodeRole) as reader:
        ticket = make_ticket(source.engine, source.address)
        await asyncio.gather(*(reader.role.peers.connect(ticket) for _ in range(5)))
        peers = [command.peer for command in reader.engine.sent_of(messages.ConnectPeer)]
        assert [(peer.peer_id, peer.engine_epoch) for peer in peers] == [(source.address, source.engine.epoch)]


async def test_a_ticket_of_an_earlier_start_is_rejected() -> None:
    async with running_worker(PrefillRole) as source, running_worker(DecodeRole) as reader:
        ticket = replace(make_ticket(source.engine, source.address), engine_epoch=b"x" * 16)
        with pytest.raises(TicketRejectedError, match="restarted"):
            await reader.role.peers.connect(ticket)


async def test_a_source_of_another_layout_or_model_is_a_mismatch() -> None:
    other = FakeEngine(layout=replace(LAYOUT, num_layers=2))
    async with running_worker(PrefillRole, other) as source, running_worker(DecodeRole) as reader:
        with pytest.raises(MismatchError, match="num_layers"):
            await reader.role.peers.connect(make_ticket(source.engine, source.address))
        assert reader.engine.sent_of(messages.ConnectPeer) == []


async def test_an_unreachable_source_is_lost_within_the_deadline() -> None:
    async with running_worker(DecodeRole, call_timeout_s=0.2) as reader:
        with pytest.raises(WorkerLostError):
            await reader.role.peers.connect(make_ticket(reader.engine, "127.0.0.1:1"))
        await wait_until(lambda: len(reader.role.peers) == 0, "the address is forgotten")


async def test_a_source_given_up_during_its_handshake_is_not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_worker(PrefillRole) as source, running_worker(DecodeRole) as reader:
        peers = reader.role.peers
        connect = source.role.kv_source.Connect

        async def connect_late(request: Any, context: Any) -> Any:
            peers._drop(peers._peers[source.address])
            return await connect(request, context)

        peer = peers._add(source.address)
        monkeypatch.setattr(peer.stub, "Connect", lambda request, **_: connect_late(request, None))
        with pytest.raises(WorkerLostError, match="given up"):
            await peers.connect(make_ticket(source.engine, source.address))
        assert reader.engine.sent_of(messages.ConnectPeer) == []
        assert peer.watch is not None
        peer.watch.cancel()
        await peer.channel.close()


async def test_a_source_that_stays_away_is_disconnected() -> None:
    async with running_worker(PrefillRole) as source, running_worker(DecodeRole) as reader:
        await reader.role.peers.connect(make_ticket(source.engine, source.address))
        await source.server.stop()
        assert (await reader.engine.expect(messages.DisconnectPeer)).peer_id == source.address
        await wait_until(lambda: len(reader.role.peers) == 0, "the peer is forgotten")


async def test_a_registered_source_that_stays_away_is_disconnected_and_not_forgotten() -> None:
    async with (
        running_worker(PrefillRole) as source,
        running_worker(DecodeRole, peers=(source.address,)) as reader,
    ):
        await reader.engine.expect(messages.ConnectPeer)
        await source.server.stop()
        assert (await reader.engine.expect(messages.DisconnectPeer)).peer_id == source.address
        assert len(reader.role.peers) == 1


async def test_a_source_restarted_at_its_address_replaces_the_old_one() -> None:
    async with running_worker(DecodeRole, follow_grace_s=5.0) as reader:
        async with running_worker(PrefillRole) as source:
            await reader.role.peers.connect(make_ticket(source.engine, source.address))
            port = int(source.address.rpartition(":")[2])
        assert reader.engine.sent_of(messages.DisconnectPeer) == []  # the grace still runs
        async with running_worker(PrefillRole, FakeEngine(epoch=b"2" * 16), port=port) as source:
            await reader.role.peers.connect(make_ticket(source.engine, source.address))
            assert (await reader.engine.expect(messages.DisconnectPeer)).peer_id == source.address
            epochs = [command.peer.engine_epoch for command in reader.engine.sent_of(messages.ConnectPeer)]
            assert epochs == [b"e" * 16, b"2" * 16]


async def test_a_link_that_the_engine_gave_up_begins_anew_with_the_next_ticket() -> None:
    async with running_worker(PrefillRole) as source, running_worker(DecodeRole) as reader:
        ticket = make_ticket(source.engine, source.address)
        await reader.role.peers.connect(ticket)
        reader.engine.dispatch(messages.PeerFailed(source.address, info_of(TransferError("quarantine is full"))))
        await reader.role.peers.connect(ticket)
        assert len(reader.engine.sent_of(messages.ConnectPeer)) == 2


# ------------------------------------------------------------------------------------- registered sources


async def free_address() -> str:
    """Of a source that was here and is gone."""
    async with running_worker(PrefillRole) as source:
        return source.address


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_a_registered_source_is_connected_before_its_first_ticket() -> None:
    async with running_worker(PrefillRole) as source:
        async with running_worker(DecodeRole, peers=(source.address,)) as reader:
            connected = await reader.engine.expect(messages.ConnectPeer)
            assert (connected.peer.peer_id, connected.peer.engine_epoch) == (source.address, source.engine.epoch)
            assert (reader.worker.streams.value, len(reader.worker.request_tasks)) == (0, 0)
            await reader.role.peers.connect(make_ticket(source.engine, source.address))
            assert len(reader.engine.sent_of(messages.ConnectPeer)) == 1


async def test_a_mere_host_is_allowed_but_not_dialled() -> None:
    async with running_worker(DecodeRole, peers=("prefill", "::1", "[::1]", "127.0.0.1")) as reader:
        assert len(reader.role.peers) == 0


async def test_a_worker_serves_before_its_registered_source_is_up_and_connects_when_it_is() -> None:
    address = await free_address()
    async with running_worker(DecodeRole, peers=(address,), call_timeout_s=0.05) as reader:
        assert reader.engine.sent_of(messages.ConnectPeer) == []
        async with running_worker(PrefillRole, port=port_of(address)):
            assert (await reader.engine.expect(messages.ConnectPeer)).peer.peer_id == address


async def test_an_absent_registered_source_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    address = await free_address()
    with caplog.at_level(logging.INFO, "kvrelay_worker.peers"):
        async with running_worker(DecodeRole, peers=(address,), call_timeout_s=0.05) as reader:
            peers = reader.role.peers
            await wait_until(lambda: "cannot be reached" in caplog.text, "its absence is told")
            with pytest.raises(WorkerLostError):  # by then its channel has been dialled again, several times
                await peers.connect(make_ticket(reader.engine, address))
            assert len(peers) == 1
    assert len([record for record in caplog.records if address in record.getMessage()]) == 1


async def test_a_registered_source_that_is_loading_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvrelay_worker.peers.LOADING_PAUSE_S", 0.001)
    connect, asked = KvSourceServicer.Connect, 0

    async def load_first(servicer: KvSourceServicer, request: Any, context: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked <= 5:
            raise UnavailableError("the engine is still loading its model; try again soon")
        return await connect(servicer, request, context)

    monkeypatch.setattr(KvSourceServicer, "Connect", load_first)
    with caplog.at_level(logging.INFO, "kvrelay_worker.peers"):
        async with running_worker(PrefillRole) as source:
            async with running_worker(DecodeRole, peers=(source.address,)) as reader:
                await reader.engine.expect(messages.ConnectPeer)
    assert asked == 6
    assert caplog.text.count("still loading") == 1


async def test_a_registered_source_that_restarted_is_connected_anew_without_a_ticket() -> None:
    address = await free_address()
    async with running_worker(DecodeRole, peers=(address,)) as reader:
        for epoch in (b"1" * 16, b"2" * 16):
            async with running_worker(PrefillRole, FakeEngine(epoch=epoch), port=port_of(address)):
                assert (await reader.engine.expect(messages.ConnectPeer)).peer.engine_epoch == epoch
            await reader.engine.expect(messages.DisconnectPeer)


async def test_a_registered_source_of_another_model_does_not_stop_the_worker(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay_worker.peers.FIRST_PAUSE_S", 0.001)
    other = FakeEngine(layout=replace(LAYOUT, num_layers=2))
    async with running_worker(PrefillRole, other) as source:
        async with running_worker(DecodeRole, peers=(source.address,)) as reader:
            await wait_until(lambda: "num_layers" in caplog.text, "the mismatch is told")
            with pytest.raises(MismatchError, match="num_layers"):
                await reader.role.peers.connect(make_ticket(source.engine, source.address))
            assert reader.engine.sent_of(messages.ConnectPeer) == []
    assert caplog.text.count("num_layers") == 1
