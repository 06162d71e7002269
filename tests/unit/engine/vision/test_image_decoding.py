"""Pictures of all kinds, good and bad: documented pixels, or a typed error."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image
from vision_checkpoints import as_bytes, draw_picture

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_engine.vision.image_decoding import decode_image as decode_within

PICTURE = draw_picture(30, 20)
LIMITS = MediaLimits()


def decode_image(data: bytes, limits: MediaLimits = LIMITS) -> Image.Image:
    return decode_within(data, limits)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "BMP"])
def test_lossless_formats_are_the_pixels(file_format: str) -> None:
    decoded = decode_image(as_bytes(PICTURE, file_format))
    assert decoded.mode == "RGB" and decoded.tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "GIF"])
def test_other_formats_are_read(file_format: str) -> None:
    data = as_bytes(PICTURE, file_format)
    assert decode_image(data).tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    ways = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = PICTURE.transpose(ways[orientation]) if orientation in ways else PICTURE
    decoded = decode_image(as_bytes(PICTURE, "PNG", exif=exif))
    assert decoded.size == upright.size and decoded.tobytes() == upright.tobytes()


def test_what_is_transparent_is_white() -> None:
    clear = PICTURE.copy()
    clear.putalpha(0)
    assert set(decode_image(as_bytes(clear)).get_flattened_data()) == {(255, 255, 255)}
    palette = Image.new("P", (3, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    found = decode_image(as_bytes(palette, "PNG", transparency=0)).get_flattened_data()
    assert list(found) == [(255, 255, 255), (10, 20, 30), (10, 20, 30)]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in colours)
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = as_bytes(first, file_format, save_all=True, append_images=others, **options)
    assert set(decode_image(data).get_flattened_data()) == {colours[0]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        as_bytes(PICTURE)[:-40],
        as_bytes(PICTURE)[:30],
        as_bytes(PICTURE, "JPEG")[:200],
        as_bytes(PICTURE, "PPM"),
        as_bytes(PICTURE, "PDF"),
        png_header(10, 10),
        png_header(0, 10),
    ],
    ids=["empty", "zeros", "svg", "cut", "cut early", "cut jpeg", "ppm", "pdf", "no pixels", "no width"],
)
def test_what_is_not_a_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"^media: ") as caught:
        decode_image(data)
    assert caught.value.metadata == {"field": "media"}


def test_a_picture_that_is_too_large_is_refused_by_its_header() -> None:
    for size in ((30_000, 30_000), (7_500, 8_000)):
        with pytest.raises(InvalidRequestError, match=r"50000000"):
            decode_image(png_header(*size))
    with pytest.raises(InvalidRequestError, match=r"30 x 20 pixels; allowed: 599"):
        decode_image(as_bytes(PICTURE), MediaLimits(max_pixels=599))
    assert decode_image(as_bytes(PICTURE), MediaLimits(max_pixels=600)).size == (30, 20)


def test_a_size_that_only_decoding_shows_is_refused() -> None:
    """The placeholders were counted by the header: embeddings of another size would not fit them."""
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    data = as_bytes(PICTURE, "WEBP", xmp=turned)
    with pytest.raises(InvalidRequestError, match=r"header says 30 x 20 pixels, decoded it has 20 x 30"):
        decode_image(data)
