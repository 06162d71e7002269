"""WorkerService and the life of a worker's server, in front of a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fake_engine import WAIT_S, FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_rig import make_config, read_one, running_worker

from kvrelay.v1 import worker_pb2 as pb
from kvrelay.v1 import worker_pb2_grpc
from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import ConfigError, KvRelayError
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.server import RpcServer
from kvrelay_engine import messages
from kvrelay_worker.server import ExitCode, Role, WorkerServer
from kvrelay_worker.worker import Worker


class BareRole(Role):
    service_names = ()

    def __init__(self, worker: Worker) -> None:
        self.live = 0
        worker.count_live(lambda: self.live)

    def add_to(self, server: RpcServer) -> None:
        """Nothing beyond WorkerService."""

    def end_all(self, error: KvRelayError) -> None:
        """Has nothing that runs."""

    async def close(self) -> None:
        """Holds nothing."""


def stub_of(channel: grpc.aio.Channel) -> Any:
    return worker_pb2_grpc.WorkerServiceStub(channel)


async def health_of(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="kvrelay.v1.WorkerService"))
    return int(answer.status)


async def test_describe_tells_what_the_engine_said_at_its_start() -> None:
    async with running_worker(BareRole) as fake:
        answer = await stub_of(fake.channel).Describe(pb.DescribeRequest())
    assert (answer.worker.worker_id, answer.worker.address) == ("prefill-0", fake.address)
    assert (answer.role, answer.engine_epoch, answer.num_blocks) == (pb.ROLE_PREFILL, b"e" * 16, 10)
    assert (list(answer.connectors), answer.vocab_size, answer.decode_alone_tokens) == (["grpc"], 100, 8)
    config = fake.engine.config
    assert config is not None
    assert (config.address, config.worker_id, config.role) == (fake.address, "prefill-0", "prefill")


async def test_one_report_checks_the_engines_counts() -> None:
    async with running_worker(BareRole) as fake:
        reports = [report async for report in stub_of(fake.channel).WatchLoad(pb.WatchLoadRequest())]
        assert [(report.blocks_total, report.streams, report.tasks) for report in reports] == [(9, 0, 0)]
        assert fake.engine.sent_of(messages.GetLoad)[0].check_integrity


async def test_only_a_changed_report_comes_again_and_without_the_check() -> None:
    async with running_worker(BareRole) as fake:
        call = stub_of(fake.channel).WatchLoad(pb.WatchLoadRequest(interval_s=0.05))
        await read_one(call)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(next_report := asyncio.ensure_future(call.read())), 0.3)
        fake.engine.reply_load = messages.Load(blocks_total=9, leases=3)
        assert (await next_report).leases == 3
        assert not fake.engine.sent_of(messages.GetLoad)[0].check_integrity
        call.cancel()


@pytest.mark.parametrize("interval_s", [-1.0, 0.001, float("nan"), 1e9])
async def test_a_senseless_interval_is_refused(interval_s: float) -> None:
    async with running_worker(BareRole) as fake:
        with pytest.raises(grpc.RpcError) as caught:
            await stub_of(fake.channel).WatchLoad(pb.WatchLoadRequest(interval_s=interval_s)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_drain_waits_for_requests_and_leases_then_the_worker_ends() -> None:
    async with running_worker(BareRole) as fake:
        fake.role.live = 1
        drain = asyncio.ensure_future(stub_of(fake.channel).Drain(pb.DrainRequest(deadline_s=60)))
        await fake.engine.expect(messages.Drain)
        assert await health_of(fake.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        for _ in range(3):
            fake.engine.beat()
        fake.role.live = 0
        fake.engine.beat(messages.Load(leases=1))
        assert not drain.done()
        fake.engine.beat()
        assert (await drain).requests_left == 0
        assert await fake.server.run() is ExitCode.OK


async def test_beats_from_before_the_engine_saw_the_drain_do_not_end_it() -> None:
    """It may have been given work that they know nothing of."""
    async with running_worker(BareRole) as fake:
        drain = asyncio.ensure_future(stub_of(fake.channel).Drain(pb.DrainRequest(deadline_s=60)))
        await fake.engine.expect(messages.Drain)
        for _ in range(3):
            fake.engine.dispatch(messages.Beat(messages.Load(), {}))
        fake.engine.beat(messages.Load(requests_running=1))
        await health_of(fake.channel)
        assert not drain.done()
        fake.engine.beat()
        assert (await drain).requests_left == 0


async def test_the_drains_deadline_tells_how_many_are_left() -> None:
    async with running_worker(BareRole) as fake:
        fake.role.live = 2
        answer = await stub_of(fake.channel).Drain(pb.DrainRequest(deadline_s=0.05))
        assert answer.requests_left == 2
        assert await fake.server.run() is ExitCode.OK
        fake.role.live = 0


async def test_the_first_signal_drains_and_the_second_one_stops() -> None:
    async with running_worker(BareRole) as fake:
        fake.role.live = 1
        fake.server.on_signal()
        await fake.engine.expect(messages.Drain)
        fake.server.on_signal()
        async with asyncio.timeout(WAIT_S):
            assert await fake.server.run() is ExitCode.OK


async def test_a_lost_engine_ends_the_worker_with_an_error() -> None:
    async with running_worker(BareRole) as fake:
        fake.engine.die()
        assert await fake.server.run() is ExitCode.LOST


class SlowEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.may_start = asyncio.Event()

    async def start(self, make_config: Any, timeout_s: float) -> messages.Started:
        await self.may_start.wait()
        return await super().start(make_config, timeout_s)


async def test_a_worker_is_alive_but_not_serving_while_its_engine_loads() -> None:
    engine = SlowEngine()
    server = WorkerServer(make_config("prefill"), BareRole, engine, ManualClock())
    starting = asyncio.ensure_future(server.start())
    while not server.worker.address:  # noqa: ASYNC110  (the port is bound in a few steps of the loop)
        await asyncio.sleep(0)
    async with open_channel(server.worker.address) as channel:
        await channel.channel_ready()
        assert await health_of(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            await stub_of(channel).Describe(pb.DescribeRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        engine.may_start.set()
        await starting
        assert await health_of(channel) == health_pb2.HealthCheckResponse.SERVING
    await server.stop()
    assert len(server.worker.tasks) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "--advertise"),
        ({"host": "::"}, "--advertise"),
        ({"worker_id": "a/b"}, "worker_id"),
        ({"port": 70000}, "port"),
        ({"drain_s": 0.0}, "drain_s"),
    ],
)
def test_a_configuration_that_cannot_work_says_what_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("prefill", **changes).validate()


def test_the_advertised_address_defaults_to_the_bound_one() -> None:
    assert make_config("prefill").address_for(7) == "127.0.0.1:7"
    assert make_config("prefill", host="::1").address_for(7) == "[::1]:7"
    assert make_config("prefill", host="0.0.0.0", advertise="p:1").address_for(7) == "p:1"
