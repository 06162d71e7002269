"""`kvrelay cache` on folders and servers that workers share."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from redis_servers import RedisServer
from sealed_parts import key_of, part_of

from kvrelay_cli.main import main
from kvrelay_cli.progress import ProgressBar
from kvrelay_transfer.tiers.disk_store import DiskStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With 6 parts of 1,000 bytes."""
    store = DiskStore(tmp_path / "kv", 1 << 20)
    for number in range(6):
        assert store.put(key_of(number), memoryview(part_of(key_of(number), 1000)))
    store.close()
    return tmp_path / "kv"


def cache(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, float]]]:
    code = main(["cache", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def damage(folder: Path, number: int) -> None:
    (path,) = folder.rglob(key_of(number).text)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_it_counts_verifies_and_clears(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--disk-cache", f"{folder}:1MiB")
    assert cache("stats", *place, capsys=capsys)[1]["disk"]["parts"] == 6
    assert cache("verify", *place, capsys=capsys) == (
        0, {"disk": {"good": 6, "truncated": 0, "foreign": 0, "damaged": 0, "gone": 0}}
    )  # fmt: skip
    assert cache("clear", *place, capsys=capsys) == (0, {"disk": {"removed": 6}})
    assert cache("stats", *place, capsys=capsys)[1]["disk"]["parts"] == 0


def test_a_damaged_part_is_found_and_removed_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--disk-cache", f"{folder}:1MiB")
    damage(folder, 3)
    for more, code, damaged in (((), 1, 1), (("--remove-bad",), 1, 1), ((), 0, 0)):
        found = cache("verify", *place, *more, capsys=capsys)
        assert (found[0], found[1]["disk"]["damaged"]) == (code, damaged)
    assert cache("stats", *place, capsys=capsys)[1]["disk"]["parts"] == 5


def test_a_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "stats", "--disk-cache", f"{folder}:1GiB"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["tier", "parts", "GiB", "of", "GiB"] and row.split()[:2] == ["disk", "6"]


def test_redis_and_disk_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RedisServer(tmp_path / "redis") as server:
        words = ("--redis-url", f"redis://{server.address}", "--disk-cache", f"{folder}:1MiB")
        found = cache("stats", *words, capsys=capsys)[1]
    assert list(found) == ["disk", "redis"] and found["redis"]["parts"] == 0


def test_who_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "stats", "--redis-url", "redis://127.0.0.1:1"]) == 1
    assert "redis does not answer: redis://127.0.0.1:1" in capsys.readouterr().err


def test_no_tier_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "stats"]) == 2
    assert "--disk-cache DIR:SIZE" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_for_terminals_only() -> None:
    for stream, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        with ProgressBar("disk", total=4, stream=stream) as bar:
            bar.show(2, 1000)
        assert ("50%  2 of 4" in stream.getvalue()) == is_shown == bool(stream.getvalue())
