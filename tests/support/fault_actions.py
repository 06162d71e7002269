"""How each fault of the matrix is brought about and undone, on real processes and from outside.

A fault is injected while one engine stands still at the stage, which then goes on unless the fault is that it does
not. What needs a client of its own (a replayed ticket, a reader that cancels, a pool filled by somebody else) is in
`fault_rivals`.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass

from fault_scene import Scene
from fault_worker import Part
from process_memory import open_pool

LONGER_THAN_THE_LEASE_S = 5.0
PAUSE_S = 1.5
SLOW_BYTES_PER_S = 150e3
# A cut longer than every grace: what was lost is given up by both sides before the link is there again.
CUT_AT_LEAST_S = 4.0
EPOCH_SHIFT = 32


def nothing(scene: Scene) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    inject: Callable[[Scene], None]
    undo: Callable[[Scene], None] = nothing
    lasts_s: float | None = None  # None: until the answer is there
    at_least_s: float = 0.0
    between_data_and_words: bool = False  # its moment, whatever the connector needs for it
    only_reader_stops: bool = False  # the source computes on while the reader stands still


# ------------------------------------------------------------------------------------------------ processes


def kill_source(scene: Scene) -> None:
    scene.victim = scene.source.name
    scene.source.kill()


def kill_reader(scene: Scene) -> None:
    scene.victim = scene.reader.name
    scene.reader.kill()


def restart_source_elsewhere(scene: Scene) -> None:
    """As a restart on the same port that takes no time: its address leads to another start of an engine."""
    kill_source(scene)
    scene.cluster.swap_link(scene.pair.source)


def undo_restart(scene: Scene) -> None:
    scene.cluster.restart(scene.source)
    scene.cluster.mend_link(scene.pair.source)


# ------------------------------------------------------------------------------------------------- memory


def reuse_blocks(scene: Scene) -> None:
    """Every word is bumped and every block written anew, as when the pins were gone and others came."""
    scene.wait_source_idle()
    with open_pool(scene.source.engine_pid) as pool:
        pool.write_words(tuple(word + 1 for word in pool.words))
        pool.overwrite_blocks()


def bump_words(scene: Scene) -> None:
    with open_pool(scene.source.engine_pid) as pool:
        pool.write_words(tuple(word + 1 for word in pool.words))


def change_epoch_of_words(scene: Scene) -> None:
    with open_pool(scene.source.engine_pid) as pool:
        pool.write_words(tuple(word ^ 1 << EPOCH_SHIFT for word in pool.words))


def restore_epoch_of_words(scene: Scene) -> None:
    """Else this engine's words would be those of another start until it ends, and every later read stale."""
    scene.wait_source_idle()
    change_epoch_of_words(scene)


# --------------------------------------------------------------------------------------------------- files


def fill_disks(scene: Scene) -> None:
    for process in (scene.cluster.router, *scene.cluster.workers):
        process.limit_files(0)


def empty_disks(scene: Scene) -> None:
    for process in (scene.cluster.router, *scene.cluster.workers):
        process.limit_files(resource.RLIM_INFINITY)


def _restart(role: str) -> Callable[[Scene], None]:
    return lambda scene: scene.cluster.restart(getattr(scene, role))


def _freeze(role: str, part: Part = Part.BOTH) -> Callable[[Scene], None]:
    return lambda scene: scene.freeze(getattr(scene, role), part)


def _thaw(role: str) -> Callable[[Scene], None]:
    return lambda scene: scene.thaw(getattr(scene, role))


def _hold(scene: Scene) -> None:
    scene.cluster.hold_link(scene.pair.source)


def _slow(scene: Scene) -> None:
    scene.cluster.slow_link(scene.pair.source, SLOW_BYTES_PER_S)


def _mend(scene: Scene) -> None:
    scene.cluster.mend_link(scene.pair.source)


FAULT_ACTIONS: dict[str, Fault] = {
    "source killed": Fault(kill_source, _restart("source")),
    "reader killed": Fault(kill_reader, _restart("reader")),
    "source stopped for 5 s": Fault(_freeze("source"), _thaw("source"), LONGER_THAN_THE_LEASE_S),
    "reader stopped for 5 s": Fault(_freeze("reader"), _thaw("reader"), LONGER_THAN_THE_LEASE_S),
    "source's engine hung for 5 s": Fault(_freeze("source", Part.ENGINE), _thaw("source"), LONGER_THAN_THE_LEASE_S),
    "reader's engine hung for 5 s": Fault(_freeze("reader", Part.ENGINE), _thaw("reader"), LONGER_THAN_THE_LEASE_S),
    "source's service stopped for 5 s": Fault(
        _freeze("source", Part.SERVICE), _thaw("source"), LONGER_THAN_THE_LEASE_S
    ),
    "reader's service stopped for 5 s": Fault(
        _freeze("reader", Part.SERVICE), _thaw("reader"), LONGER_THAN_THE_LEASE_S
    ),
    "network cut": Fault(_hold, _mend, at_least_s=CUT_AT_LEAST_S),
    "slow link": Fault(_slow, _mend),
    "source paused for 1.5 s": Fault(_freeze("source"), _thaw("source"), PAUSE_S),
    "reader paused for 1.5 s": Fault(_freeze("reader"), _thaw("reader"), PAUSE_S),
    "network away for 1.5 s": Fault(_hold, _mend, PAUSE_S),
    "block reused under the read": Fault(reuse_blocks, only_reader_stops=True),
    "word changed between data and word read": Fault(bump_words, between_data_and_words=True),
    "word of another epoch": Fault(change_epoch_of_words, restore_epoch_of_words, between_data_and_words=True),
    "epoch changed by a restart on the same port": Fault(restart_source_elsewhere, undo_restart),
    "disk and shm full": Fault(fill_disks, empty_disks),
}
