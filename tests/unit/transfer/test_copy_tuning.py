"""The environment of engine processes."""

from __future__ import annotations

from kvrelay_transfer.copy_tuning import copy_environment

SETTING = "glibc.cpu.x86_non_temporal_threshold=1048576"


def test_the_threshold_is_added_to_what_is_there() -> None:
    assert copy_environment({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": SETTING}
    tuned = copy_environment({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"})
    assert tuned["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=1:{SETTING}"


def test_a_threshold_that_the_user_set_stays() -> None:
    theirs = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=99999"}
    assert copy_environment(theirs) == theirs
