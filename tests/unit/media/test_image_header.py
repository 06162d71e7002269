"""Sizes from headers equal what decoding gives, and bad images are typed errors that cost no memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_core.media.image_header import IMAGE_FORMATS, ImageHeader, read_image_header
from kvrelay_core.media.limits import MOST_PIXELS, MediaLimits

LIMITS = MediaLimits()


def encode(mode: str = "RGB", size: tuple[int, int] = (31, 17), form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def upright_size(data: bytes) -> tuple[int, int]:
    """By decoding, as the reference implementation does."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_every_format(form: str) -> None:
    assert read_image_header(encode(form=form), LIMITS) == ImageHeader(form, 31, 17)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(form: str, orientation: int) -> None:
    data = encode(form=form, exif=oriented(orientation))
    header = read_image_header(data, LIMITS)
    assert (header.width, header.height) == upright_size(data) == ((31, 17) if orientation < 5 else (17, 31))


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    data = encode(exif=oriented(6))
    at = data.index(b"eXIf") - 4
    (size,) = struct.unpack_from(">I", data, at)
    chunk, rest = data[at : at + 12 + size], data[:at] + data[at + 12 + size :]
    late = rest[:-12] + chunk + rest[-12:]  # before IEND
    header = read_image_header(late, LIMITS)
    assert (header.width, header.height) == upright_size(late) == (17, 31)


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("CMYK", "JPEG", {}),
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "GIF", {}),
        ("L", "JPEG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {"lossless": False}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_modes(mode: str, form: str, options: dict[str, Any]) -> None:
    data = encode(mode, form=form, **options)
    assert read_image_header(data, LIMITS) == ImageHeader(form, 31, 17)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animated_image_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (31, 17), color) for color in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, form, save_all=True, append_images=frames[1:])
    assert read_image_header(out.getvalue(), LIMITS) == ImageHeader(form, 31, 17)


@given(st.integers(1, 2000), st.integers(1, 50), st.booleans())
def test_webp_of_any_size(width: int, height: int, lossless: bool) -> None:
    data = encode(size=(width, height), form="WEBP", lossless=lossless, method=0)
    assert read_image_header(data, LIMITS) == ImageHeader("WEBP", width, height)


def png_of(width: int, height: int) -> bytes:
    """The header says so; the pixels are cut off."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I", 9)
        + b"IDAT"
    )


def webp_of(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "data",
    [
        png_of(30_000, 30_000),
        webp_of(30_000, 30_000),
        png_of(9_000, 9_950),  # within Pillow's bound, not within ours
        webp_of(1 << 24, 1 << 24),
        b"GIF89a" + struct.pack("<HH", 30_000, 30_000) + bytes(3) + b"," + bytes(10),
        b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, 30_000, 30_000, 1, 24) + bytes(24),
    ],
)
def test_a_bomb_is_refused_by_its_header_and_costs_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match="50000000") as caught:
            read_image_header(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.metadata["field"] == "media"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no bytes"),
        (b"not an image at all", "not an image"),
        (b"%PDF-1.7", "not an image"),
        (png_of(0, 5), "not an image|pixels"),
        (encode()[:20], "broken"),
        (encode(form="WEBP")[:16], "broken"),
        (encode(form="GIF")[:8], "broken"),
        (encode(form="JPEG")[:30], "broken"),
        (encode(form="TIFF"), "not an image"),
        (b"x" * (LIMITS.max_item_bytes + 1), "bytes; allowed"),
    ],
)
def test_what_is_no_image_is_a_typed_error(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_image_header(data, LIMITS)


@pytest.mark.parametrize("form", IMAGE_FORMATS)
@given(st.data())
def test_bytes_cut_off_or_altered_anywhere_never_raise_anything_else(form: str, data: st.DataObject) -> None:
    broken = bytearray(encode(form=form, exif=oriented(6)) if form in ("JPEG", "PNG", "WEBP") else encode(form=form))
    at = data.draw(st.integers(0, len(broken) - 1))
    broken[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(broken)))
    try:
        header = read_image_header(bytes(broken[:cut]), LIMITS)
    except InvalidRequestError:
        return
    assert header.width * header.height <= LIMITS.max_pixels


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_no_pixel_is_decoded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(form=form)

    def load(self: Image.Image) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    read_image_header(data, LIMITS)


@pytest.mark.parametrize("limits", [MediaLimits(max_items=0), MediaLimits(max_pixels=MOST_PIXELS + 1)])
def test_limits_that_make_no_sense_are_refused(limits: MediaLimits) -> None:
    with pytest.raises(ConfigError):
        limits.validate()
