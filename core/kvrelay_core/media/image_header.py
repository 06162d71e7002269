"""Format and size of an image from its header, turned as its EXIF orientation says. No pixel is decoded.

That an image's body is cut off shows only where it is decoded, in the encoder. Of an animated image the first frame
counts. Orientation is read from EXIF alone, wherever in the file that is.
"""

from __future__ import annotations

import io
import struct

from msgspec import Struct
from PIL import ExifTags, Image, UnidentifiedImageError

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.webp_header import is_webp, webp_exif, webp_size

# As Pillow names them. Whoever decodes takes these alone: every further format is code that meets strangers' bytes.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class ImageHeader(Struct, frozen=True):
    format: str  # one of IMAGE_FORMATS
    width: int  # in pixels, upright
    height: int


def read_image_header(data: bytes, limits: MediaLimits) -> ImageHeader:
    """Raises InvalidRequestError for no image, an unknown or broken one, or one beyond the limits."""
    _require(bool(data), "the image has no bytes; send the file's content")
    _require(len(data) <= limits.max_item_bytes, f"the image has {len(data)} bytes; allowed: {limits.max_item_bytes}")
    try:
        header = _read_webp(data) if is_webp(data) else _read_by_pillow(data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequestError(
            f"media: the image has more than the {limits.max_pixels} pixels allowed; make it smaller", field="media"
        ) from error
    except Exception as error:  # whatever a parser raises on strangers' bytes
        detail = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise InvalidRequestError(
            f"media: not an image, or a broken one ({detail}); send one of {', '.join(IMAGE_FORMATS)}", field="media"
        ) from error
    width, height = header.width, header.height
    _require(width > 0 and height > 0, f"the image is {width} x {height} pixels; it needs at least one")
    _require(
        width * height <= limits.max_pixels,
        f"the image is {width} x {height} pixels; allowed: {limits.max_pixels} in all; make it smaller",
    )
    return header


def _read_webp(data: bytes) -> ImageHeader:
    exif = webp_exif(data)
    orientation = 1
    if exif:
        parsed = Image.Exif()
        parsed.load(exif)
        orientation = parsed.get(ExifTags.Base.Orientation, 1)
    return _upright("WEBP", webp_size(data), orientation)


def _read_by_pillow(data: bytes) -> ImageHeader:
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.format == "PNG" and "exif" not in image.info and (exif := _late_png_exif(data)):
            image.info["exif"] = exif
        # Not the format's own method: that of PNG would decode the pixels to look behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        assert image.format is not None, "it was opened"
        return _upright(image.format, image.size, orientation)


def _upright(name: str, size: tuple[int, int], orientation: int) -> ImageHeader:
    width, height = size
    return ImageHeader(name, height, width) if orientation in _SIDEWAYS else ImageHeader(name, width, height)


def _late_png_exif(data: bytes) -> bytes:
    """The eXIf chunk of a PNG, which may come behind the pixels; empty when there is none."""
    at = 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"eXIf":
            return b"Exif\x00\x00" + data[at + 8 : at + 8 + size]
        at += 12 + size
    return b""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"media: {message}", field="media")
