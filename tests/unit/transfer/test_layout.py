"""The pool's shape: sizes, compatibility, and keys of blocks larger and smaller than a hash unit."""

from __future__ import annotations

import pytest
from handoff_sides import LAYOUT
from msgspec.structs import replace

from kvrelay_core.errors import ConfigError, MismatchError
from kvrelay_transfer.layout import KvLayout, block_keys, check_groups


def test_block_bytes_is_the_product_of_the_shape() -> None:
    assert LAYOUT.shape == (2, 2, 2, 4, 8)
    assert LAYOUT.block_bytes == 2 * 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "int4"},
        {"block_tokens": 24},
        {"hash_unit_tokens": 0},
        {"num_layers": 0},
        {"head_dim": 0},
        {"tp_rank": 1},
    ],
)
def test_an_impossible_layout_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(LAYOUT, **changes).validate()


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"dtype": "bfloat16"}, "dtype", "--dtype"),
        ({"num_layers": 3}, "num_layers", "model"),
        ({"head_dim": 16}, "head_dim", "model"),
        ({"hash_unit_tokens": 16}, "hash_unit_tokens", "hash unit"),
        ({"num_kv_heads": 3}, "num_kv_heads", "model"),
        ({"tp_size": 2, "num_kv_heads": 2}, "num_kv_heads", "model"),
    ],
)
def test_other_content_is_a_mismatch_that_says_what_to_change(
    changes: dict[str, object], field: str, remedy: str
) -> None:
    theirs = replace(LAYOUT, **changes)
    for source, reader in ((theirs, LAYOUT), (LAYOUT, theirs)):
        with pytest.raises(MismatchError, match=f"{field}.*the same {remedy}"):
            reader.check_compatible(source)


@pytest.mark.parametrize(
    ("changes", "needs_slices"),
    [
        ({}, False),
        ({"block_tokens": 64}, True),
        ({"tp_size": 2, "num_kv_heads": 1, "tp_rank": 1}, True),
        ({"tp_size": 4, "num_kv_heads": 1}, True),  # two ranks with a copy of each head
    ],
)
def test_other_blocks_and_ranks_are_compatible(changes: dict[str, object], needs_slices: bool) -> None:
    theirs = replace(LAYOUT, **changes)
    theirs.validate()
    for source, reader in ((theirs, LAYOUT), (LAYOUT, theirs)):
        reader.check_compatible(source)
        assert reader.needs_slices(source) is needs_slices


def test_copies_of_heads_on_both_sides_fit_whole() -> None:
    """Two heads over four ranks and over eight."""
    four, eight = (replace(LAYOUT, num_kv_heads=1, tp_size=tp_size) for tp_size in (4, 8))
    four.check_compatible(eight)
    eight.check_compatible(four)
    assert not four.needs_slices(eight)


@pytest.mark.parametrize("name", KvLayout.__struct_fields__)
def test_any_difference_is_another_fingerprint(name: str) -> None:
    theirs = replace(LAYOUT, **{name: "bfloat16" if name == "dtype" else 64})
    assert LAYOUT.fingerprint() != theirs.fingerprint()


def test_a_large_block_is_keyed_by_its_last_unit() -> None:
    layout = replace(LAYOUT, block_tokens=16, hash_unit_tokens=8)
    assert block_keys([b"a", b"b", b"c", b"d", b"e"], layout) == [b"b", b"d"]


def test_small_blocks_of_a_unit_are_keyed_by_unit_and_index() -> None:
    layout = replace(LAYOUT, block_tokens=4, hash_unit_tokens=8)
    assert block_keys([b"a", b"b"], layout) == [b"a\0\0", b"a\1\0", b"b\0\0", b"b\1\0"]


def test_a_window_is_part_of_the_fingerprint_and_of_the_content() -> None:
    """Without one the fingerprint is what it was before there were any."""
    window = replace(LAYOUT, window=24)
    assert window.fingerprint() != LAYOUT.fingerprint() != replace(LAYOUT, window=25).fingerprint()
    assert KvLayout("float32", 1, 2, 64, 8).fingerprint().hex()[:16] == "51448c765c0ea21d"
    with pytest.raises(MismatchError, match="window"):
        LAYOUT.check_compatible(window)
    with pytest.raises(MismatchError, match="2 KV groups"):
        check_groups([LAYOUT], [LAYOUT, window])
    check_groups([LAYOUT, window], [LAYOUT, window])


@pytest.mark.parametrize(("num_tokens", "first"), [(0, 0), (23, 0), (27, 1), (28, 1), (31, 2)])
def test_the_first_block_of_a_window(num_tokens: int, first: int) -> None:
    assert replace(LAYOUT, window=24).first_block(num_tokens) == first
    assert LAYOUT.first_block(num_tokens) == 0
