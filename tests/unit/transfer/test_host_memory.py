"""What a process may have, by the machine's word and that of every control group above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrelay_transfer import host_memory

ROOMY = 1 << 60


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in /pod/container: the outer group has a limit, the inner one has none."""
    membership, mount = tmp_path / "cgroup", tmp_path / "mount"
    membership.write_text("1:name=systemd:/x\n0::/pod/container\n")
    add_group(mount / "pod", "1000", 400)
    add_group(mount / "pod/container", "max", 300)
    monkeypatch.setattr(host_memory, "_MEMBERSHIP", membership)
    monkeypatch.setattr(host_memory, "_MOUNT", mount)
    return mount


def add_group(group: Path, limit: str, used_bytes: int) -> None:
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit + "\n")
    (group / "memory.current").write_text(f"{used_bytes}\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50\n")


def test_every_group_up_to_the_root_counts(groups: Path) -> None:
    assert host_memory.available_bytes() == 1000 - 400 + 50
    assert host_memory.total_bytes() == 1000


def test_the_tightest_group_decides(groups: Path) -> None:
    (groups / "pod/container/memory.max").write_text("500\n")
    assert host_memory.available_bytes() == 500 - 300 + 50
    assert host_memory.total_bytes() == 500


def test_a_group_over_its_limit_has_nothing_left(groups: Path) -> None:
    (groups / "pod/memory.current").write_text("2000\n")
    assert host_memory.available_bytes() == 0


def test_without_a_limit_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_MEMBERSHIP", tmp_path / "missing")
    assert host_memory.available_bytes() == 1024 * 1024
    assert host_memory.total_bytes() == 2048 * 1024


def test_this_machine_has_memory() -> None:
    assert 0 < host_memory.available_bytes() <= host_memory.total_bytes() < ROOMY
