"""Run folders are private, go at the end, and those of dead supervisors are swept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvrelay_cli.run_directory import PREFIX, RunDirectory, remove_abandoned


def test_it_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run_dir:
        assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
        socket = run_dir.clean_role("prefill-0") / "socket"
        socket.touch()
        assert not list(run_dir.clean_role("prefill-0").iterdir())
    assert not list(tmp_path.iterdir())


def test_the_living_are_left_alone_and_the_abandoned_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{PREFIX}dead"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    unfinished = tmp_path / f"{PREFIX}young"  # another supervisor has not made its lock yet
    unfinished.mkdir()
    with RunDirectory(tmp_path) as living:
        assert not abandoned.exists()
        assert remove_abandoned(tmp_path) == []
        assert living.path.exists()
        assert unfinished.exists()


def test_folders_of_other_users_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / f"{PREFIX}foreign"
    foreign.mkdir()
    (foreign / "lock").touch()
    if os.getuid() == 0:
        os.chown(foreign, 12345, 12345)
        assert remove_abandoned(tmp_path) == []
    else:
        assert remove_abandoned(tmp_path) == [foreign]
