"""The same picture in the same place has the same hashes; another one, or another place, never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.hashing import hash_units, root_hash
from kvrelay_core.media.hash_keys import media_keys
from kvrelay_core.media.references import check_references
from kvrelay_core.request import MediaReference

UNIT = 4
CAT, DOG = b"c" * 32, b"d" * 32
IMAGE = MediaReference(CAT, offset=5, num_tokens=6, grid=(1, 4, 6))  # in units 1 and 2
VIDEO = replace(IMAGE, seconds_per_grid=1.0)
TOKENS = list(range(20))


def hashes(*media: MediaReference) -> list[bytes]:
    return hash_units(root_hash(b"m"), TOKENS, UNIT, media_keys(media, UNIT))


def test_golden_vectors() -> None:
    """Keys live in other processes and on disks: they may never change."""
    assert [key.hex() for key in media_keys([IMAGE], UNIT)] == [
        "",
        "63" * 32 + "0100000000000000" + "06000000" + "00000000" + "01000000" + "04000000" + "06000000",
        "63" * 32 + "fdffffffffffffff" + "06000000" + "00000000" + "01000000" + "04000000" + "06000000",
    ]


def test_a_golden_vector_of_a_video() -> None:
    [_, first, _] = media_keys([VIDEO], UNIT)
    assert first.hex() == (
        "63" * 32 + "0100000000000000" + "06000000" + "ffffffff" + "01000000" + "04000000" + "06000000"
        + "000000000000f03f"
    )  # fmt: skip


def test_text_has_the_hashes_that_it_always_had() -> None:
    assert hashes() == hash_units(root_hash(b"m"), TOKENS, UNIT)


def test_an_image_changes_its_units_and_those_behind_it() -> None:
    plain, seen = hashes(), hashes(IMAGE)
    assert plain[:1] == seen[:1]
    assert all(a != b for a, b in zip(plain[1:], seen[1:], strict=True))


@pytest.mark.parametrize(
    "other",
    [
        replace(IMAGE, content_hash=DOG),
        replace(IMAGE, offset=6),
        replace(IMAGE, num_tokens=5),
        replace(IMAGE, first_row=6),
        replace(IMAGE, grid=(1, 6, 4)),
        VIDEO,
        replace(IMAGE, first_row=0xFFFF_FFFF),
    ],
)
def test_another_image_or_the_same_elsewhere_or_cut_otherwise_never_hits(other: MediaReference) -> None:
    assert hashes(IMAGE) == hashes(replace(IMAGE))
    assert not set(hashes(IMAGE)[1:]) & set(hashes(other))


def test_a_video_at_another_rate_never_hits() -> None:
    assert hashes(VIDEO) == hashes(replace(VIDEO))
    for other in (replace(VIDEO, seconds_per_grid=2.0), replace(VIDEO, offset=6), replace(VIDEO, content_hash=DOG)):
        assert not set(hashes(VIDEO)[1:]) & set(hashes(other))


@given(st.lists(st.tuples(st.sampled_from([CAT, DOG]), st.integers(0, 3), st.integers(1, 9)), max_size=5))
def test_every_unit_that_an_item_reaches_into_names_it(runs: list[tuple[bytes, int, int]]) -> None:
    media, at = [], 0
    for content_hash, gap, length in runs:
        media.append(MediaReference(content_hash, at + gap, length))
        at += gap + length
    check_references(media, at)
    keys = media_keys(media, UNIT)
    assert len(keys) == -(-at // UNIT)
    for unit, key in enumerate(keys):
        inside = [
            item for item in media
            if item.offset < (unit + 1) * UNIT and item.offset + item.num_tokens > unit * UNIT
        ]  # fmt: skip
        assert len(key) == 60 * len(inside)
        assert [key[at : at + 32] for at in range(0, len(key), 60)] == [item.content_hash for item in inside]


@given(st.integers(0, 20), st.integers(0, 20))
def test_what_comes_behind_a_prefix_does_not_change_it(second: int, cut: int) -> None:
    """Nor does it within the last unit that is full, if it begins behind that."""
    later = MediaReference(DOG, 11 + second, 3)
    num_units = min((11 + second) // UNIT, cut // UNIT)
    both = hash_units(root_hash(b"m"), list(range(40)), UNIT, media_keys([IMAGE, later], UNIT))
    one = hash_units(root_hash(b"m"), list(range(40)), UNIT, media_keys([IMAGE], UNIT))
    assert both[:num_units] == one[:num_units]


@pytest.mark.parametrize(
    "media",
    [
        [replace(IMAGE, content_hash=b"short")],
        [replace(IMAGE, num_tokens=0)],
        [replace(IMAGE, num_tokens=16)],
        [IMAGE, replace(IMAGE, offset=10)],
        [replace(IMAGE, offset=12), IMAGE],
        [replace(VIDEO, seconds_per_grid=-1.0)],
        [replace(VIDEO, seconds_per_grid=float("nan"))],
        [replace(VIDEO, seconds_per_grid=float("inf"))],
        [replace(VIDEO, first_row=1)],
    ],
)
def test_references_outside_the_prompt_or_in_each_others_way_are_refused(media: list[MediaReference]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_references(media, len(TOKENS))
    assert caught.value.metadata["field"] == "media"
