"""The command line itself: help, exit codes, one-line errors, start-up cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvrelay_cli.main import COMMANDS, load_command, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    command = load_command(name)
    assert f"kvrelay {name}" in command.EPILOG
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0


def test_help_imports_neither_torch_nor_grpc() -> None:
    code = (
        "import sys\n"
        "from kvrelay_cli.main import main\n"
        "try:\n    main(['up', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'grpc', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "examples:" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["up"], "--model is missing"),
        (["up", "--model", "m", "--http-port", "8000"], "--http-port is not available in this release"),
        (["up", "--config", "/nonexistent/file.toml"], "cannot read --config"),
        (["serve", "prefill"], "--model is missing"),
        (["generate", "--target", "h:1", "--prompt", "x", "--tls-ca", "ca.pem"], "TLS needs all of"),
        (["serve", "router", "--model", "m"], "--decode is missing"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["up", "--decode", "0"],
        ["up", "--grpc-port", "70000"],
        ["up", "--memory-fraction", "nan"],
        ["up", "--device", "tpu"],
        ["serve", "router", "--prefill", "nowhere"],
        ["nonsense"],
    ],
)
def test_a_bad_flag_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_a_command_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvrelay ")
