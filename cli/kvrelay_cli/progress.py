"""One line on a terminal that says how far something is. Nothing where stderr is no terminal: logs stay readable."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30
_EVERY_S = 0.1


class ProgressBar:
    """Use as a context manager: the line is gone in the end. `total` may be too small: it is what was known before."""

    def __init__(self, what: str, total: int, stream: TextIO = sys.stderr) -> None:
        self._what = what
        self._total = total
        self._stream = stream
        self._is_shown = stream.isatty()
        self._begun_s = time.monotonic()
        self._shown_s = 0.0

    def show(self, done: int, size_bytes: int) -> None:
        """So many are done, of so many bytes together."""
        now_s = time.monotonic()
        if not self._is_shown or now_s - self._shown_s < _EVERY_S:
            return
        self._shown_s = now_s
        share = min(1.0, done / max(1, self._total))
        bar = ("#" * round(share * _WIDTH)).ljust(_WIDTH, "-")
        gb_per_s = size_bytes / max(1e-9, now_s - self._begun_s) / 1e9
        self._write(f"{self._what} [{bar}] {share:4.0%}  {done} of {self._total}  {gb_per_s:.2f} GB/s")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_shown:
            self._write("")

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()
