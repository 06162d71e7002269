"""When an engine that fails steps has to end: one bad batch is survived, a broken device is not.

A device or model that fails every step must not stay in service as the worker that answers fastest.
"""

from __future__ import annotations

from kvrelay_core.errors import InternalError

MAX_IN_A_ROW = 3


class FailedSteps:
    def __init__(self) -> None:
        self._in_a_row = 0

    def clear(self) -> None:
        """A step succeeded."""
        self._in_a_row = 0

    def add(self, error: Exception) -> None:
        """Raises InternalError when it was one failure too many: the engine has to be started anew."""
        self._in_a_row += 1
        if self._in_a_row >= MAX_IN_A_ROW:
            raise InternalError(
                f"{self._in_a_row} steps in a row failed; this engine has to be started anew"
            ) from error
