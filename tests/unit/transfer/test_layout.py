"""The pool's shape: sizes, compatibility, and keys of blocks larger and smaller than a hash unit."""

from __future__ import annotations

import pytest
from handoff_sides import LAYOUT
from msgspec.structs import replace

from kvrelay_core.errors import ConfigError, MismatchError
from kvrelay_transfer.layout import KvLayout, block_keys


def test_block_bytes_is_the_product_of_the_shape() -> None:
    assert LAYOUT.shape == (2, 2, 2, 4, 8)
    assert LAYOUT.block_bytes == 2 * 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    "changes", [{"dtype": "int4"}, {"block_tokens": 24}, {"hash_unit_tokens": 0}, {"num_layers": 0}, {"head_dim": 0}]
)
def test_an_impossible_layout_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(LAYOUT, **changes).validate()


@pytest.mark.parametrize("name", KvLayout.__struct_fields__)
def test_any_difference_is_a_mismatch_that_names_the_field(name: str) -> None:
    theirs = replace(LAYOUT, **{name: "bfloat16" if name == "dtype" else 64})
    with pytest.raises(MismatchError, match=name):
        LAYOUT.check_compatible(theirs)
    assert LAYOUT.fingerprint() != theirs.fingerprint()
    LAYOUT.check_compatible(replace(theirs, **{name: getattr(LAYOUT, name)}))


def test_a_large_block_is_keyed_by_its_last_unit() -> None:
    layout = replace(LAYOUT, block_tokens=16, hash_unit_tokens=8)
    assert block_keys([b"a", b"b", b"c", b"d", b"e"], layout) == [b"b", b"d"]


def test_small_blocks_of_a_unit_are_keyed_by_unit_and_index() -> None:
    layout = replace(LAYOUT, block_tokens=4, hash_unit_tokens=8)
    assert block_keys([b"a", b"b"], layout) == [b"a\0\0", b"a\1\0", b"b\0\0", b"b\1\0"]
