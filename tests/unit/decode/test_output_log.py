from __future__ import annotations

import pytest

from kvrelay_core.errors import OverloadedError
from kvrelay_core.request import TokenLogprobs
from kvrelay_decode.output_log import OutputLog, Row
from kvrelay_decode.step_split import REPLAY_ROWS, StepColumns, pack


def fill(log: OutputLog, choice: int, positions: range) -> None:
    for position in positions:
        log.append(Row(choice, position, 100 + position, None))


def test_rows_come_from_the_position_of_each_choice() -> None:
    log = OutputLog()
    fill(log, 0, range(0, 4))
    fill(log, 1, range(0, 3))
    rows = list(log.rows_from({0: 2}))
    assert [(row.choice, row.position) for row in rows] == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    assert list(log.rows_from({0: 4, 1: 9})) == []


def test_rows_that_are_no_longer_kept_are_a_typed_error() -> None:
    log = OutputLog(limit=2)
    fill(log, 0, range(5, 9))
    assert [row.position for row in log.rows_from({0: 7})] == [7, 8]
    with pytest.raises(OverloadedError, match="from position 7"):
        list(log.rows_from({0: 6}))
    with pytest.raises(OverloadedError):
        list(log.rows_from({}))


def test_columns_have_logprobs_for_every_row_or_for_none() -> None:
    columns = StepColumns()
    columns.add(7, Row(0, 3, 42, None))
    message = columns.to_wire()
    assert (list(message.handles), list(message.choices), list(message.positions)) == ([7], [0], [3])
    assert (list(message.token_ids), len(message.logprobs)) == ([42], 0)
    columns.add(8, Row(1, 0, 43, TokenLogprobs(-0.5, ((43, -0.5),))))
    message = columns.to_wire()
    assert [entry.logprob for entry in message.logprobs] == [0.0, -0.5]
    assert [len(entry.top) for entry in message.logprobs] == [0, 1]


def test_a_replay_is_cut_into_messages_of_bounded_size() -> None:
    rows = [Row(0, position, 1, None) for position in range(REPLAY_ROWS + 1)]
    assert [len(message.token_ids) for message in pack(3, rows)] == [REPLAY_ROWS, 1]
