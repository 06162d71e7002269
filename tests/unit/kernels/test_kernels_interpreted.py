"""Every Triton kernel against its torch reference, on the CPU in Triton's interpreter (float32)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay_kernels.specs import all_specs

CASES = [(name, shape) for name, spec in all_specs().items() for shape in spec.shapes]


class Interpreter:
    def __init__(self) -> None:
        worker = Path(__file__).with_name("interpreter_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def check(self, name: str, shape: str) -> str | None:
        """What went wrong, or None."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps((name, shape)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            return f"the interpreter process ended with status {self._process.wait()}"
        failure: str | None = json.loads(answer)
        return failure

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize(("name", "shape"), CASES, ids=[f"{name}-{shape}" for name, shape in CASES])
def test_kernel_agrees_with_its_reference(interpreter: Interpreter, name: str, shape: str) -> None:
    failure = interpreter.check(name, shape)
    assert failure is None, failure
