"""What workers say of themselves: that they drain, and what load they have beyond this router's."""

from __future__ import annotations

import asyncio

from fake_relay import RelayMaker, tokens
from fake_worker import decode_well, prefill_well

from kvrelay.v1.common_pb2 import KvLayout
from kvrelay.v1.worker_pb2 import DescribeResponse, WatchLoadResponse
from kvrelay_router.placement import LoadAccount
from kvrelay_router.worker_load import reported_tokens
from kvrelay_router.worker_session import WorkerState


async def test_a_worker_that_says_it_drains_is_not_asked(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    relay.prefill[0].behaviour = prefill_well
    draining, other = relay.decode
    other.behaviour = decode_well
    session = relay.server.registry.decode[draining.address]
    draining.loads.put_nowait(WatchLoadResponse(draining=True))
    async with asyncio.timeout(5):
        await relay.server.registry.wait_until(lambda: session.state is WorkerState.DRAINING)
    for _ in range(3):
        assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)
    assert not draining.calls


async def test_the_load_of_other_routers_counts(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 1)
    for prefill in relay.prefill:
        prefill.behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    busy, idle = relay.prefill
    loads = relay.server.fleet.loads
    busy.loads.put_nowait(WatchLoadResponse(tokens_queued=5000))
    async with asyncio.timeout(5):
        while loads.load_of(busy.address) != 5000:  # noqa: ASYNC110  # no event for it
            await asyncio.sleep(0.001)
    for _ in range(3):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert (len(busy.calls), len(idle.calls)) == (0, 3)
    await busy.stop()
    session = relay.server.registry.prefill[busy.address]
    async with asyncio.timeout(5):
        await relay.server.registry.wait_until(lambda: session.state is WorkerState.LOST)
    assert loads.load_of(busy.address) == 0, "what it said before it was lost"


def test_a_report_adds_only_what_the_own_account_does_not_know() -> None:
    loads = LoadAccount()
    loads.charge("w", 100)
    loads.note_report("w", 80)  # of ours
    assert loads.load_of("w") == 100
    loads.note_report("w", 150)
    assert loads.load_of("w") == 150
    loads.discharge("w", 100)
    assert (loads.load_of("w"), loads.total) == (50, 0)


def test_what_a_report_says_in_tokens() -> None:
    description = DescribeResponse(layouts=[KvLayout(block_tokens=16)])
    load = WatchLoadResponse(tokens_queued=70, blocks_in_use=10, requests_running=3, requests_waiting_remote_kv=1)
    assert reported_tokens("prefill", description, load) == 70
    assert reported_tokens("decode", description, load) == 96
    assert reported_tokens("decode", DescribeResponse(), load) == 0
