"""A child that answers each line of JSON on its stdin by one on its stdout, and ends with its stdin or its parent.

Knows nothing of what the lines mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from kvrelay_core.errors import DeadlineError, WorkerLostError
from kvrelay_core.parent_death import parent_death_tie

CLOSE_TIMEOUT_S = 10.0
_READ_BYTES = 1 << 20


class LineChild:
    """The child's side. Whatever libraries print to stdout goes to stderr, so that it is not taken for an answer."""

    def __init__(self) -> None:
        parent_death_tie(os.getppid())()
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def questions(self) -> Iterator[Any]:
        """Until the parent closes the pipe."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, value: Any) -> None:
        """The one line that each question gets."""
        print(json.dumps(value), file=self._answers, flush=True)


class LineProcess:
    """Runs `python -m MODULE ARGUMENTS... FOLDER`; the folder is private and goes when it is closed."""

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self._name = module.rpartition(".")[2]
        self._folder = tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp")
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, self._folder.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def ask(self, question: Any, timeout_s: float) -> Any:
        """Raises DeadlineError after `timeout_s`, WorkerLostError when the child ends: in both cases it is gone."""
        with contextlib.suppress(BrokenPipeError):  # the answer will tell
            _pipe(self._process.stdin).write(f"{json.dumps(question)}\n".encode())
            _pipe(self._process.stdin).flush()
        return json.loads(self._read_line(timeout_s))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended before us
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()
        self._folder.cleanup()

    def _read_line(self, timeout_s: float) -> bytes:
        give_up_s = time.monotonic() + timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(_pipe(self._process.stdout), selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, give_up_s - time.monotonic())):
                    self._process.kill()
                    raise DeadlineError(f"the {self._name} process said nothing for {timeout_s:.3g} s")
                part = os.read(_pipe(self._process.stdout).fileno(), _READ_BYTES)
                if not part:
                    raise self._ended()
                line += part
        return line

    def _ended(self) -> WorkerLostError:
        try:
            status = self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        said = self._log.read_text(errors="replace").strip().splitlines()
        return WorkerLostError(f"the {self._name} process ended with status {status}{': ' + said[-1] if said else ''}")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
