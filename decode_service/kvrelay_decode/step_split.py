"""Packs token rows for the wire: the tokens of one engine step become one message per stream.

This is the hot path of the service: columns, no message per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from kvrelay.v1 import common_pb2, decode_pb2
from kvrelay_core.rpc.wire import logprobs_to_wire
from kvrelay_decode.output_log import Row

REPLAY_ROWS = 4096  # in one message


class StepColumns:
    """The rows of one message, in the order in which they are added."""

    def __init__(self) -> None:
        self._handles: list[int] = []
        self._rows: list[Row] = []
        self._has_logprobs = False

    def add(self, handle: int, row: Row) -> None:
        self._handles.append(handle)
        self._rows.append(row)
        self._has_logprobs = self._has_logprobs or row.logprobs is not None

    def to_wire(self) -> decode_pb2.StepTokens:
        choices, positions, token_ids, logprobs = zip(*self._rows, strict=True)
        unset = common_pb2.TokenLogprobs()
        return decode_pb2.StepTokens(
            handles=self._handles,
            choices=choices,
            positions=positions,
            token_ids=token_ids,
            logprobs=[logprobs_to_wire(entry) or unset for entry in logprobs] if self._has_logprobs else (),
        )


def pack(handle: int, rows: Iterable[Row]) -> Iterator[decode_pb2.StepTokens]:
    """Rows of one request in messages of bounded size."""
    rows = iter(rows)
    while part := list(islice(rows, REPLAY_ROWS)):
        columns = StepColumns()
        for row in part:
            columns.add(handle, row)
        yield columns.to_wire()
