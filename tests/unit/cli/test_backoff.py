from __future__ import annotations

from kvrelay_cli.backoff import GOOD_RUN_S, Backoff


def test_it_doubles_to_ten_seconds_and_starts_anew_after_a_good_run() -> None:
    backoff = Backoff()
    assert [backoff.after_run(0) for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    assert backoff.after_run(GOOD_RUN_S) == 0.5
    assert backoff.after_run(1) == 1
