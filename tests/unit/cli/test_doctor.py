"""`kvrelay doctor` says what is there and what is wrong."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay_cli import connector_report, machine_report
from kvrelay_cli.commands.doctor import Report, examine
from kvrelay_cli.finding import Verdict
from kvrelay_cli.main import main


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a base install."""
    monkeypatch.setattr(connector_report, "is_installed", lambda module: False)


@pytest.mark.usefixtures("without_torch")
def test_without_torch_each_connector_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[:2] for line in lines} <= {"ok", "--"}
    for name in ("system", "CPU cores", "memory", "lockable memory", "memfd and seals", "/dev/shm", "run folder"):
        assert any(line[5:].startswith(name) for line in lines)
    [torch] = [line for line in lines if line[5:].startswith("torch")]
    assert "a router and clients, no workers; pip install 'kvrelay[engine]'" in torch
    needing = [line for line in lines if "missing: connectors need torch; pip install 'kvrelay[engine]'" in line]
    assert [line.split()[1] for line in needing] == ["cuda_ipc", "shm", "nixl", "ucx", "grpc"]


def test_doctor_runs_in_a_base_install() -> None:
    """Where none of the extras can be imported."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'numpy', 'nixl', 'ucxx', 'triton', 'safetensors')))\n"
        "from kvrelay_cli.main import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not installed: this machine can run a router and clients" in done.stdout


@pytest.mark.usefixtures("without_torch")
def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] is None and found["problems"] == []
    assert {"verdict": "ok", "name": "run folder"}.items() <= found["findings"][6].items()
    assert found["connectors"][1]["name"] == "shm" and not found["connectors"][1]["works"]
    assert found["connectors"][1]["missing"]["get_it"] == "pip install 'kvrelay[engine]'"


@pytest.mark.usefixtures("without_torch")
def test_a_problem_is_named_and_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert main(["doctor", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == ["run folder"]
    assert captured.err == "kvrelay: this machine has problems: run folder\n"


def test_a_torch_that_cannot_be_looked_at_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "kvrelay_cli.transfer.no_such_module"
    monkeypatch.setattr("kvrelay_cli.transfer.prober.MODULE", module)
    report = Report(echo=False)
    examine(report, measure=True)
    assert report.problems() == ["torch"]
    [torch] = [finding for finding in report.as_json()["findings"] if finding["name"] == "torch"]
    assert "ended with status 1" in torch["text"] and f"No module named {module}" in torch["text"]


def test_another_system_is_told_and_not_looked_at_further(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert main(["doctor"]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("BAD  system") and line.endswith("workers need Linux")


def test_limits_of_locked_memory() -> None:
    assert machine_report.memlock(resource.RLIM_INFINITY).verdict is Verdict.OK
    little = machine_report.memlock(8 << 20)
    assert little.verdict is Verdict.ABSENT and little.text.startswith("8.0 MiB; only a network card")


def test_a_limit_of_the_control_group_is_told_apart_from_the_machine() -> None:
    gib = machine_report.GIB
    assert machine_report.memory(2 * gib, 8 * gib, 8 * gib).text == "2.0 of 8.0 GiB available"
    limited = machine_report.memory(2 * gib, 4 * gib, 8 * gib)
    assert limited.text == "2.0 of 4.0 GiB available (a control group's limit; the machine has 8.0)"
    assert machine_report.memory(gib // 2, 4 * gib, 8 * gib).verdict is Verdict.BAD


def test_a_long_temporary_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 15)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    finding = machine_report.run_directory()
    assert finding.verdict is Verdict.BAD and "set TMPDIR to a shorter one" in finding.text


def test_shared_memory_that_is_not_mounted_is_no_problem(tmp_path: Path) -> None:
    finding = machine_report.dev_shm(tmp_path / "shm")
    assert finding.verdict is Verdict.ABSENT and "pools are memfds" in finding.text


def test_memory_that_cannot_be_had_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    finding = machine_report.memfd()
    assert finding.verdict is Verdict.BAD and "not permitted" in finding.text
