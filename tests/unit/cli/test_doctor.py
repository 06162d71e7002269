"""`kvrelay doctor` says what is there and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrelay_cli.main import main
from kvrelay_cli.probes import measure, probe_grpc, probe_memcpy, probe_shm


def test_a_table_of_what_this_machine_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[:2] for line in lines} <= {"ok", "--"}
    for name in ("CPU cores", "memory", "torch", "memfd and seals", "run folder"):
        assert any(name in line for line in lines)


def test_a_problem_is_named_and_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert main(["doctor", "--no-speed"]) == 2
    captured = capsys.readouterr()
    assert "BAD  run folder" in captured.out
    assert captured.err == "kvrelay: this machine has problems: run folder\n"


def test_every_way_to_move_blocks_is_measured() -> None:
    shm, size_bytes = probe_shm(num_blocks=3)
    for speed in (shm, probe_memcpy(size_bytes), probe_grpc(size_bytes)):
        assert 0 < speed.first_gb_per_s < 1e4
        assert 0 < speed.gb_per_s < 1e4


def test_the_first_copy_is_kept_apart() -> None:
    calls: list[int] = []
    measure(lambda: calls.append(1), 10)
    assert len(calls) > 1
