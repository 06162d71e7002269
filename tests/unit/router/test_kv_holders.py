"""The router's memory of where KV was left."""

from __future__ import annotations

from kvrelay_router.kv_holders import KvHolders


def anybody(worker: str) -> bool:
    return True


def chain(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_the_longest_known_part_of_a_chain_is_found() -> None:
    holders = KvHolders()
    holders.note("d0", chain("a", "ab"))
    holders.note("d1", chain("a", "ab", "abc"))
    assert holders.find(chain("a", "ab", "abc", "abcd"), anybody) == ("d1", 3)
    assert holders.find(chain("a", "ab", "abx"), anybody) == ("d1", 2)
    assert holders.find(chain("x"), anybody) is None
    assert holders.find([], anybody) is None


def test_the_worker_that_held_it_last_is_the_one() -> None:
    holders = KvHolders()
    holders.note("d1", chain("a", "ab"))
    holders.note("d0", chain("a"))
    assert holders.find(chain("a", "ab"), anybody) == ("d1", 2)
    assert holders.find(chain("a"), anybody) == ("d0", 1)


def test_a_worker_that_cannot_be_used_is_passed_over_for_a_shorter_part() -> None:
    holders = KvHolders()
    holders.note("gone", chain("a", "ab"))
    holders.note("here", chain("a"))
    assert holders.find(chain("a", "ab"), lambda worker: worker == "here") == ("here", 1)
    assert holders.find(chain("a", "ab"), lambda worker: False) is None


def test_memory_is_bounded_and_the_ends_of_old_chains_go_first() -> None:
    holders = KvHolders(max_units=3)
    holders.note("d0", chain("a", "ab", "abc"))
    holders.note("d1", chain("x"))
    assert len(holders) == 3
    assert holders.find(chain("a", "ab", "abc"), anybody) == ("d0", 2)
    holders.note("d0", chain("a"))
    holders.note("d1", chain("x", "xy", "xyz"))
    assert len(holders) == 3
    assert holders.find(chain("a"), anybody) is None
