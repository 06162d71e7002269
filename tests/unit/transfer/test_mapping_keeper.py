"""The keeper sees owners end, and unmaps nothing that is still in use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from handoff_sides import wait_until

from kvrelay_transfer.connectors.mapping_keeper import MappingKeeper


class FakeMapping:
    """Of an owner that lives until `owner_end` is closed."""

    def __init__(self) -> None:
        self.life_fd, self.owner_end = os.pipe2(os.O_CLOEXEC)
        self.is_lost = False
        self.is_busy = False
        self.num_unmapped = 0
        self.thread = ""

    def lose(self) -> None:
        self.is_lost = True

    def unmap(self) -> bool:
        self.thread = threading.current_thread().name
        if self.is_busy:
            return False
        self.num_unmapped += 1
        return True

    def end_owner(self) -> None:
        os.close(self.owner_end)


@pytest.fixture
def keeper() -> Iterator[MappingKeeper]:
    before = len(os.listdir("/proc/self/fd"))
    keeper = MappingKeeper("keeper")
    yield keeper
    keeper.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "keeper" not in {thread.name for thread in threading.enumerate()}


def test_a_mapping_goes_with_its_owner(keeper: MappingKeeper) -> None:
    dying, living = FakeMapping(), FakeMapping()
    keeper.watch(dying)
    keeper.watch(living)
    dying.end_owner()
    wait_until(lambda: dying.num_unmapped == 1)
    assert dying.is_lost and dying.thread == "keeper"
    assert not living.is_lost and living.num_unmapped == 0
    keeper.retire(dying)  # the link is closed later, which changes nothing
    keeper.retire(living)
    wait_until(lambda: living.num_unmapped == 1)
    assert dying.num_unmapped == 1 and not living.is_lost
    living.end_owner()


def test_a_late_close_does_not_take_the_mapping_that_has_its_descriptor_now(keeper: MappingKeeper) -> None:
    dead = FakeMapping()
    keeper.watch(dead)
    dead.end_owner()
    wait_until(lambda: dead.num_unmapped == 1)
    fresh = FakeMapping()
    if fresh.life_fd != dead.life_fd:
        os.dup2(fresh.life_fd, dead.life_fd)
        os.close(fresh.life_fd)
        fresh.life_fd = dead.life_fd
    keeper.watch(fresh)
    keeper.retire(dead)
    keeper.retire(fresh)
    wait_until(lambda: fresh.num_unmapped == 1)
    assert dead.num_unmapped == 1
    fresh.end_owner()


def test_an_owner_that_was_dead_before_is_noticed(keeper: MappingKeeper) -> None:
    mapping = FakeMapping()
    mapping.end_owner()
    keeper.watch(mapping)
    wait_until(lambda: mapping.num_unmapped == 1)


def test_a_killed_process_is_noticed(keeper: MappingKeeper) -> None:
    mapping = FakeMapping()
    owner = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[mapping.owner_end]
    )
    mapping.end_owner()  # the process has it now
    keeper.watch(mapping)
    assert not mapping.is_lost
    owner.kill()
    wait_until(lambda: mapping.num_unmapped == 1)
    assert owner.stdin is not None
    owner.stdin.close()
    owner.wait()


def test_what_is_in_use_is_not_unmapped(keeper: MappingKeeper) -> None:
    mapping = FakeMapping()
    mapping.is_busy = True
    keeper.watch(mapping)
    mapping.end_owner()
    wait_until(lambda: mapping.thread == "keeper")
    assert mapping.is_lost and mapping.num_unmapped == 0
    mapping.is_busy = False
    wait_until(lambda: mapping.num_unmapped == 1)


def test_closing_waits_for_what_was_retired() -> None:
    keeper = MappingKeeper("keeper")
    mapping = FakeMapping()
    mapping.is_busy = True
    keeper.watch(mapping)
    keeper.retire(mapping)
    wait_until(lambda: mapping.thread == "keeper")
    threading.Timer(0.02, lambda: setattr(mapping, "is_busy", False)).start()
    keeper.close()
    assert mapping.num_unmapped == 1
    mapping.end_owner()
