"""The real engine process with a real, small model, spoken to as a service does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
import zmq
from checkpoints import make_checkpoint, reference_greedy
from engine_rig import attempt_of, make_config, make_generation
from processes import cpu_seconds

from kvrelay_core.request import FinishReason
from kvrelay_engine import messages
from kvrelay_engine.loop import BEAT_S

START_TIMEOUT_S = 60.0
TIMEOUT_S = 20.0
ENGINE_COMMAND = (sys.executable, "-P", "-m", "kvrelay_engine.process", "--config")

E = TypeVar("E", bound=messages.Event)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


class ServiceEnd:
    """The service's ends of both pipes, and the engine process that it started."""

    def __init__(self, directory: Path, model: Path, **changes: Any) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        endpoints = {f"{name}_endpoint": f"ipc://{directory / name}" for name in ("commands", "events")}
        self._commands.bind(endpoints["commands_endpoint"])
        self._events.bind(endpoints["events_endpoint"])
        self.config = make_config(model=str(model), run_dir=str(directory), **(endpoints | changes))
        self.config_file = directory / "engine.json"
        self.config_file.write_text(self.config.to_json())
        self._decoder = msgspec.msgpack.Decoder(messages.EngineEvent)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen([*ENGINE_COMMAND, str(self.config_file)])

    def send(self, command: messages.EngineCommand) -> None:
        self._commands.send(msgspec.msgpack.encode(command))

    def wait_for(self, event_type: type[E], timeout_s: float = TIMEOUT_S) -> tuple[E, list[messages.Event]]:
        """The next event of the type, and those before it."""
        skipped: list[messages.Event] = []
        while self._events.poll(int(timeout_s * 1000)):
            event = self._decoder.decode(self._events.recv())
            if isinstance(event, event_type):
                return event, skipped
            skipped.append(event)
        raise AssertionError(f"no {event_type.__name__} within {timeout_s} s; but {skipped}")

    def hang_up(self) -> None:
        self._commands.close(linger=0)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._commands.close(linger=0)
        self._events.close(linger=0)
        self._context.term()


@pytest.fixture
def open_service(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., ServiceEnd]]:
    services: list[ServiceEnd] = []

    def open_one(**changes: Any) -> ServiceEnd:
        services.append(ServiceEnd(tmp_path, changes.pop("model", checkpoint), **changes))
        return services[-1]

    yield open_one
    for service in services:
        service.close()


def exit_code(service: ServiceEnd) -> int:
    assert service.process is not None
    return service.process.wait(TIMEOUT_S)


def test_it_starts_answers_beats_and_exits_when_told(open_service: Callable[..., ServiceEnd], checkpoint: Path) -> None:
    service = open_service(kv_blocks=32, block_tokens=16, hash_unit_tokens=16)
    service.start()
    started, before = service.wait_for(messages.Started, START_TIMEOUT_S)
    assert not before
    assert (started.num_blocks, started.max_model_len, started.device[:3]) == (32, 31 * 16, "cpu")
    assert {offer.name for offer in started.offers} == {"shm", "grpc"}
    torch.set_num_threads(1)
    prompt = [5, 6, 7] * 9
    (expected,) = reference_greedy(checkpoint, [prompt], 12, min_margin=1e-3)
    service.send(messages.Decode(1, attempt_of(1), make_generation(prompt, 12)))
    finished, before = service.wait_for(messages.ChoiceFinished)
    assert finished == messages.ChoiceFinished(1, 0, FinishReason.LENGTH, 12)
    assert [
        token for event in before if isinstance(event, messages.StepTokens) for token in event.token_ids
    ] == expected
    service.wait_for(messages.Beat)
    service.send(messages.GetLoad(4, check_integrity=True))
    reply, _ = service.wait_for(messages.LoadReply)
    assert (reply.call, reply.error, reply.load.blocks_in_use, reply.load.requests_running) == (4, None, 0, 0)
    told_s = time.monotonic()
    service.send(messages.Drain())
    seen = 0
    while seen < 5:
        beat, _ = service.wait_for(messages.Beat)
        seen += beat.is_draining
    assert time.monotonic() - told_s < 4 * BEAT_S, "a drain waits for the usual beats"
    service.send(messages.Shutdown())
    assert exit_code(service) == 0


def test_an_idle_engine_uses_next_to_no_cpu(open_service: Callable[..., ServiceEnd]) -> None:
    service = open_service()
    service.start()
    service.wait_for(messages.Started, START_TIMEOUT_S)
    assert service.process is not None
    service.wait_for(messages.Beat)
    before_s = cpu_seconds(service.process.pid)
    for _ in range(6):  # three seconds by the engine's own clock
        service.wait_for(messages.Beat)
    assert cpu_seconds(service.process.pid) - before_s <= 0.03


def test_a_start_that_cannot_work_says_why(open_service: Callable[..., ServiceEnd], tmp_path: Path) -> None:
    service = open_service(kv_blocks=100_000_000)
    service.start()
    failed, _ = service.wait_for(messages.StartFailed, START_TIMEOUT_S)
    assert failed.error.reason == "ConfigError"
    assert "GiB are free; lower --kv-blocks" in failed.error.message
    assert exit_code(service) == 1


def test_a_share_of_memory_without_room_for_a_pool_is_refused(open_service: Callable[..., ServiceEnd]) -> None:
    service = open_service(kv_blocks=None, memory_fraction=1e-6)
    service.start()
    failed, _ = service.wait_for(messages.StartFailed, START_TIMEOUT_S)
    assert failed.error.reason == "ConfigError"
    assert "leaves no room for a KV pool" in failed.error.message
    assert exit_code(service) == 1


def test_without_a_block_count_the_pool_is_what_all_seats_can_use(open_service: Callable[..., ServiceEnd]) -> None:
    service = open_service(kv_blocks=None, max_num_seqs=4, max_model_len=256, block_tokens=16, hash_unit_tokens=16)
    service.start()
    started, _ = service.wait_for(messages.Started, START_TIMEOUT_S)
    assert started.num_blocks == 4 * 256 // 16 + 1


def test_a_missing_model_is_named(open_service: Callable[..., ServiceEnd], tmp_path: Path) -> None:
    service = open_service(model=tmp_path / "no-model")
    service.start()
    failed, _ = service.wait_for(messages.StartFailed, START_TIMEOUT_S)
    assert failed.error.reason == "ConfigError"
    assert "no-model" in failed.error.message


def test_wrong_configuration_is_told_at_once(tmp_path: Path) -> None:
    done = subprocess.run([*ENGINE_COMMAND, '{"rolle": 1}'], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "engine configuration" in done.stderr


def test_it_exits_when_the_service_hangs_up(open_service: Callable[..., ServiceEnd]) -> None:
    service = open_service()
    service.start()
    service.wait_for(messages.Started, START_TIMEOUT_S)
    service.wait_for(messages.Beat)
    service.hang_up()
    assert exit_code(service) == 3


def test_signals_to_the_whole_group_are_left_to_the_service(open_service: Callable[..., ServiceEnd]) -> None:
    service = open_service()
    service.start()
    service.wait_for(messages.Started, START_TIMEOUT_S)
    assert service.process is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        service.process.send_signal(number)
    service.wait_for(messages.Beat)
    service.wait_for(messages.Beat)
    service.send(messages.Shutdown())
    assert exit_code(service) == 0


PARENT = """
import subprocess, sys
process = subprocess.Popen(sys.argv[1:])
print(process.pid, flush=True)
process.wait()
"""


def test_it_dies_with_its_parent(open_service: Callable[..., ServiceEnd]) -> None:
    """The pipes stay open: it is the parent's death that ends it."""
    service = open_service()
    command = [sys.executable, "-P", "-c", PARENT, *ENGINE_COMMAND, str(service.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = os.pidfd_open(int(parent.stdout.readline()))
        try:
            service.wait_for(messages.Started, START_TIMEOUT_S)
            assert not select.select([engine], [], [], 0)[0]
            parent.kill()
            assert select.select([engine], [], [], TIMEOUT_S)[0], "the engine outlived its parent"
        finally:
            os.close(engine)
