"""`kvrelay bench transfer`: its flags, its table, what it says of connectors that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvrelay_cli import bench_transfer
from kvrelay_cli.main import main
from kvrelay_cli.transfer import measure
from kvrelay_cli.transfer.measure import Devices, Row, devices_for
from kvrelay_cli.transfer.pair import layout_of
from kvrelay_core.errors import ConfigError, InternalError, TransferError

MIB = 1 << 20


def make_row(name: str, span_bytes: int, size_bytes: int) -> Row:
    return Row(
        connector=name, span_bytes=span_bytes, size_bytes=size_bytes, connect_s=0.001, first_gb_per_s=1.0,
        gb_per_s=3.0, plain_gb_per_s=4.0, one_span_s=0.0005,
    )  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """No process is started; the connectors in the dictionary fail."""
    failing: dict[str, Exception] = {}

    class NoSource:
        def __init__(self, device: str) -> None: ...
        def close(self) -> None: ...

    def fake(name: str, source: Any, devices: Devices, sizes: list[int], size_bytes: int, _: int) -> Iterator[Row]:
        if name in failing:
            raise failing[name]
        yield from (make_row(name, size, size_bytes) for size in sizes)

    monkeypatch.setattr("kvrelay_cli.transfer.source.Source", NoSource)
    monkeypatch.setattr(measure, "measure_spans", fake)
    return failing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--connector", "smoke"], "'smoke' is no connector; there are cuda_ipc, shm, nixl, ucx, grpc"),
        (["--connector", "auto"], "'auto' is no connector"),
        (["--connector", ","], "is no connector"),
        (["--span-kib", "16,100"], "is not a list of powers of two from 4"),
        (["--span-kib", "2"], "is not a list of powers of two from 4"),
        (["--size-mib", "0"], "must be at least 1"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_a_bad_flag_says_what_would_be_accepted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "transfer", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "transfer", "--help"])
    assert stopped.value.code == 0
    assert "kvrelay bench transfer --connector shm,grpc" in capsys.readouterr().out


def test_a_span_larger_than_what_is_moved_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", "--size-mib", "1", "--span-kib", "2048"]) == 2
    assert "raise it" in capsys.readouterr().err


def test_without_torch_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvrelay\[engine\]'"):
        bench_transfer.choose_device(None)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_transfer.choose_device(None) == "cpu"
    with pytest.raises(ConfigError, match="use --device cpu"):
        bench_transfer.choose_device("cuda")


def test_which_connectors_suit_a_device() -> None:
    assert bench_transfer.suitable("cpu") == ("shm", "nixl", "ucx", "grpc")
    assert bench_transfer.suitable("cuda") == ("cuda_ipc", "nixl", "ucx", "grpc")


@pytest.mark.parametrize(("num_gpus", "expected"), [(1, Devices("cuda:0", "cuda:0")), (4, Devices("cuda:1", "cuda:0"))])
def test_two_gpus_where_there_are_two(monkeypatch: pytest.MonkeyPatch, num_gpus: int, expected: Devices) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert devices_for("cuda") == expected
    assert devices_for("cpu") == Devices("cpu", "cpu")


@pytest.mark.parametrize("span_kib", [4, 16, 128, 512, 2048, 8192])
def test_a_layout_of_every_span_size(span_kib: int) -> None:
    layout = layout_of(span_kib << 10)
    layout.validate()
    assert layout.block_bytes == span_kib << 10


def test_the_table_goes_to_stdout_and_progress_to_stderr(
    measured: dict[str, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["nixl"] = ConfigError("NIXL is not installed")
    words = ["--device", "cpu", "--span-kib", "16,2048", "--size-mib", "2"]
    assert main(["bench", "transfer", *words]) == 0
    captured = capsys.readouterr()
    header, *lines = captured.out.splitlines()
    assert header.split("  ")[0] == "connector" and "of memcpy" in header
    assert [line.split()[:4] for line in lines[:2]] == [
        ["shm", "16", "3.00", "75%"],
        ["shm", "2048", "3.00", "75%"],
    ]
    assert len(lines) == 6
    assert "nixl: left out: NIXL is not installed" in captured.err


def test_json_has_rows_and_what_was_left_out(
    measured: dict[str, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["ucx"] = TransferError("the peer went away")
    assert main(["bench", "transfer", "--device", "cpu", "--span-kib", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["connector"] for row in result["rows"]] == ["shm", "nixl", "grpc"]
    assert result["rows"][0]["share_of_plain"] == 0.75 and result["rows"][0]["size_bytes"] == 64 * MIB
    assert result["skipped"] == {"ucx": "the peer went away"}


def test_a_named_connector_that_does_not_work_is_exit_code_2(
    measured: dict[str, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["nixl"] = ConfigError("NIXL is not installed")
    assert main(["bench", "transfer", "--connector", "shm,nixl", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "shm" in captured.out
    assert captured.err.endswith("kvrelay: not every connector could be measured: nixl: NIXL is not installed\n")


def test_wrong_bytes_end_the_run(measured: dict[str, Exception]) -> None:
    measured["shm"] = InternalError("the blocks that arrived are not those that were sent; nothing was measured")
    assert main(["bench", "transfer", "--device", "cpu"]) == 1


def test_other_names_are_benchmarks_of_the_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nonsense"]) == 2
    assert "no benchmark 'nonsense'; there is" in capsys.readouterr().err


def test_first_touch_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for the reads and the copies."""
    now_s = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    lasting = iter([4.0, 1.0, 3.0, 2.0])  # the first read, then three more
    pair = FakePair(lambda: now_s.__setitem__(0, now_s[0] + next(lasting)))
    row = measure._measure("shm", pair, MIB, lambda: now_s.__setitem__(0, now_s[0] + 0.5), 3)  # type: ignore[arg-type]
    assert (row.first_gb_per_s, row.gb_per_s, row.plain_gb_per_s) == (0.25, 0.5, 2.0)
    assert pair.num_checked == 4 and pair.num_checked_one == measure.LATENCY_REPEATS


class FakePair:
    size_bytes = 10**9
    connect_s = 0.0

    def __init__(self, read: Callable[[], None]) -> None:
        self.read_in_pieces = read
        self.num_checked = self.num_checked_one = 0

    def scatter(self) -> None: ...

    def read_one(self) -> None: ...

    def check(self, num_spans: int | None = None) -> None:
        if num_spans is None:
            self.num_checked += 1
        else:
            self.num_checked_one += 1
