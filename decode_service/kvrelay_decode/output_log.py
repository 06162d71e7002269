"""What one request has put out so far, to be sent again to a router that comes back (PROTOCOL C7).

Bounded: a router that is behind the oldest row that is kept cannot resume. Knows nothing of streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvrelay_core.errors import OverloadedError
from kvrelay_core.request import TokenLogprobs

DEFAULT_LIMIT = 16384  # tokens of one choice


class Row(NamedTuple):
    choice: int
    position: int
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class OutputLog:
    limit: int = DEFAULT_LIMIT
    _rows: dict[int, deque[Row]] = field(default_factory=dict)
    _dropped: dict[int, int] = field(default_factory=dict)  # choice -> position after the last dropped row

    @property
    def has_rows(self) -> bool:
        return bool(self._rows)

    def append(self, row: Row) -> None:
        """Positions of a choice ascend."""
        rows = self._rows.setdefault(row.choice, deque())
        rows.append(row)
        if len(rows) > self.limit:
            self._dropped[row.choice] = rows.popleft().position + 1

    def rows_from(self, next_positions: Mapping[int, int]) -> Iterator[Row]:
        """Rows from the given position of each choice on; all rows of a choice that is not named.

        Raises OverloadedError when some of them are not kept any more.
        """
        for choice, end in self._dropped.items():
            if next_positions.get(choice, 0) < end:
                raise OverloadedError(
                    f"choice {choice} is kept from position {end} on only; place the request anew", position=end
                )
        for choice, rows in self._rows.items():
            first = next_positions.get(choice, 0)
            yield from (row for row in rows if row.position >= first)
