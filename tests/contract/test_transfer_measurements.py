"""What `doctor` and `bench transfer` measure with, for real: two processes, each connector that is installed here."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvrelay_cli import connector_report
from kvrelay_cli.main import main
from kvrelay_cli.transfer.line_process import LineProcess
from kvrelay_cli.transfer.measure import Devices, measure_spans
from kvrelay_cli.transfer.pair import Pair
from kvrelay_cli.transfer.prober import MODULE
from kvrelay_cli.transfer.source import Source
from kvrelay_core.errors import ConfigError, DeadlineError, InternalError, WorkerLostError

SPAN_BYTES, SIZE_BYTES = 16 << 10, 1 << 20
PATIENCE_S = 100.0
EXTRAS = {"nixl": "nixl", "ucx": "ucxx"}


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    source = Source("cpu")
    yield source
    source.close()


@pytest.mark.parametrize("name", ["shm", "grpc", "nixl", "ucx"])
def test_each_connector_is_measured(name: str, source: Source) -> None:
    if name in EXTRAS and not connector_report.is_installed(EXTRAS[name]):
        pytest.skip(f"needs the extra {name}")
    sizes = (SPAN_BYTES, SIZE_BYTES)
    rows = list(measure_spans(name, source, Devices("cpu", "cpu"), sizes, SIZE_BYTES, repeats=1))
    assert [(row.span_bytes, row.size_bytes) for row in rows] == [(size, SIZE_BYTES) for size in sizes]
    for row in rows:
        assert min(row.first_gb_per_s, row.gb_per_s, row.plain_gb_per_s, row.one_span_s, row.connect_s) > 0


@pytest.fixture
def pair(source: Source, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair("shm", source, SPAN_BYTES, SIZE_BYTES, "cpu", tmp_path)
    yield pair
    pair.close()


def test_a_wrong_byte_is_noticed(pair: Pair) -> None:
    pair.read_in_pieces()
    pair.check()
    row = pair.side.memory.block_rows[pair.spans.local[-1]]
    row[100] += 1
    pair.check(len(pair.spans.local) - 1)
    with pytest.raises(InternalError, match="not those that were sent"):
        pair.check()


def test_blocks_that_did_not_arrive_are_noticed(pair: Pair) -> None:
    pair.read_all()
    pair.scatter()
    with pytest.raises(InternalError, match="not those that were sent"):
        pair.check()


def test_a_wrong_word_is_noticed(pair: Pair) -> None:
    pair._words += np.uint64(1)
    with pytest.raises(InternalError, match="fence words"):
        pair.read_one()


def test_a_connector_that_cannot_serve_the_device_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_ipc connects pools on cuda"):
        Pair("cuda_ipc", source, SPAN_BYTES, SIZE_BYTES, "cpu", tmp_path)


def test_a_process_that_ends_says_its_last_words() -> None:
    process = LineProcess("kvrelay_cli.no_such_module")
    with pytest.raises(WorkerLostError, match=r"ended with status 1: .*No module named kvrelay_cli.no_such_module"):
        process.ask("anything", PATIENCE_S)
    process.close()


def test_a_process_that_says_nothing_is_killed() -> None:
    process = LineProcess(MODULE)
    with pytest.raises(DeadlineError, match="said nothing for"):
        process.ask(["facts"], 0.001)
    with pytest.raises(WorkerLostError, match="status -9"):
        process.ask(["facts"], PATIENCE_S)
    process.close()


def test_what_a_library_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_child.py").write_text(
        "import os\n"
        "from kvrelay_cli.transfer.line_process import LineChild\n"
        "child = LineChild()\n"
        "for question in child.questions():\n"
        "    print('loading', flush=True)\n"
        "    os.write(1, b'more\\n')\n"
        "    child.answer(question)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    process = LineProcess("loud_child")
    assert process.ask(["echo", 1], PATIENCE_S) == ["echo", 1]
    process.close()


@pytest.mark.full
def test_doctor_measures_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With patience, for the machine may be busy."""
    patient = functools.partial(connector_report.ConnectorSurvey, budget_s=PATIENCE_S)
    monkeypatch.setattr(connector_report, "ConnectorSurvey", patient)
    monkeypatch.setattr(connector_report, "FACTS_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(connector_report, "MEASURE_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(connector_report, "connector_names", lambda: ("cuda_ipc", "shm", "grpc"))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {state["name"]: state for state in found["connectors"]}
    assert found["torch"]["auto"]["cpu"][0] == "shm" and found["problems"] == []
    assert states["cuda_ipc"]["works"] == bool(found["torch"]["gpus"])
    for name in ("shm", "grpc"):
        assert states[name]["works"] and states[name]["speed"]["gb_per_s"] > 0


def test_bench_transfer_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--connector", "shm", "--device", "cpu", "--size-mib", "1", "--span-kib", "16,1024", "--repeats", "1"]
    assert main(["bench", "transfer", *words]) == 0
    captured = capsys.readouterr()
    assert [line.split()[:2] for line in captured.out.splitlines()[1:]] == [["shm", "16"], ["shm", "1024"]]
    assert "shm: spans of 1024 KiB: " in captured.err
