"""From the bytes of a picture to upright RGB pixels.

EXIF orientation is applied first. What is transparent is laid over white, as transformers' processors do; palettes,
greys and CMYK are converted by Pillow; of an animation the first frame is taken. It knows nothing of models.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from PIL import Image, ImageOps

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.image_header import IMAGE_FORMATS, ImageHeader, read_image_header
from kvrelay_core.media.limits import MediaLimits

_WHITE: Final = (255, 255, 255, 255)
# Pillow holds the interpreter's lock while it lays one picture over another: a band at a time, others get their turn.
_BAND_PIXELS: Final = 1 << 20

_BYTES_PER_PIXEL: Final = 9  # of a picture and a copy of it, measured
_WEBP_BYTES_PER_PIXEL: Final = 17  # its decoder has two more


def decoding_bytes(data: bytes, limits: MediaLimits) -> tuple[ImageHeader, int]:
    """The header, and how much `decode_image` takes for a while. Raises InvalidRequestError as it does."""
    header = read_image_header(data, limits)
    per_pixel = _WEBP_BYTES_PER_PIXEL if header.format == "WEBP" else _BYTES_PER_PIXEL
    return header, header.width * header.height * per_pixel


def decode_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """An upright picture in mode RGB, of the size that its header was read to have.

    Raises InvalidRequestError where the bytes are not one, or beyond the limits: then no pixel is decoded. The picture
    takes 4 bytes a pixel.
    """
    header = read_image_header(data, limits)
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)  # elsewhere would be one copy more
            decoded = _to_rgb(image)
    except Exception as error:  # whatever a parser raises on strangers' bytes
        raise InvalidRequestError(
            f"media: the image cannot be decoded ({error}); send a whole file of one of {', '.join(IMAGE_FORMATS)}",
            field="media",
        ) from error
    if decoded.size != (header.width, header.height):
        raise InvalidRequestError(
            f"media: the image's header says {header.width} x {header.height} pixels, decoded it has {decoded.width} x "
            f"{decoded.height}; save it anew, upright",
            field="media",
        )
    return decoded


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    over = image if image.mode == "RGBA" else image.convert("RGBA")
    laid = Image.new("RGB", over.size)
    band_height = max(1, _BAND_PIXELS // over.width)
    for top in range(0, over.height, band_height):
        band = over.crop((0, top, over.width, min(top + band_height, over.height)))
        laid.paste(Image.alpha_composite(Image.new("RGBA", band.size, _WHITE), band).convert("RGB"), (0, top))
    return laid
