from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.hashing import hash_units, root_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_golden_vectors() -> None:
    """Keys live in other processes and on disks: they may never change."""
    root = root_hash(b"model", b"adapter", "tenant")
    assert root.hex() == "74462af9cfe4107936838b9f0ed841f11c63f2b43818378aef87938e940c8b1a"
    assert [unit.hex() for unit in hash_units(root, [1, 2, 3, 4, 70000], 2)] == [
        "6cb40a6d42805017c4083fc50a2fc81ece320e528c400e93583869a69082dabc",
        "cdf7c65b51e4de0526b28a801ef64bcfa68b4a7569cf41975730de0f9745a139",
    ]
    assert (
        hash_units(root, [1, 2], 2, [b"media"])[0].hex()
        == "1734a13cb73ac550fb3e32d2ffba3d9ee4aa0518772511cae5a5f7292c3c4fcb"
    )


@given(TOKENS, TOKENS)
def test_the_chain_of_a_prefix_is_a_prefix_of_the_chain(head: list[int], tail: list[int]) -> None:
    root = root_hash(b"m")
    whole = hash_units(root, head + tail, 4)
    assert whole[: len(head) // 4] == hash_units(root, head, 4)
    assert len(whole) == (len(head) + len(tail)) // 4


@given(st.lists(st.integers(0, 99), min_size=8, max_size=8), st.integers(0, 7))
def test_a_changed_token_changes_its_unit_and_all_later_ones(tokens: list[int], position: int) -> None:
    root = root_hash(b"m")
    changed = list(tokens)
    changed[position] += 1
    pairs = list(zip(hash_units(root, tokens, 2), hash_units(root, changed, 2), strict=True))
    assert all(a == b for a, b in pairs[: position // 2])
    assert all(a != b for a, b in pairs[position // 2 :])


def test_roots_differ_in_every_field_and_fields_do_not_run_together() -> None:
    roots = [
        root_hash(b"m"),
        root_hash(b"n"),
        root_hash(b"m", b"a"),
        root_hash(b"m", b"", "a"),
        root_hash(b"ma", b"", ""),
        root_hash(b"", b"ma", ""),
    ]
    assert len(set(roots)) == len(roots)


def test_extra_keys_change_only_their_unit_and_the_ones_behind_it() -> None:
    root = root_hash(b"m")
    plain = hash_units(root, list(range(8)), 2)
    keyed = hash_units(root, list(range(8)), 2, [b"", b"image"])
    assert plain[0] == keyed[0]
    assert all(a != b for a, b in zip(plain[1:], keyed[1:], strict=True))
