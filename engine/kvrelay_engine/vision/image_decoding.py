"""From the bytes of a picture to upright RGB pixels.

EXIF orientation is applied first. What is transparent is laid over white, as transformers' processors do; palettes,
greys and CMYK are converted by Pillow; of an animation the first frame is taken. It knows nothing of models.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from PIL import Image, ImageOps

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.image_header import IMAGE_FORMATS, read_image_header
from kvrelay_core.media.limits import MediaLimits

_WHITE: Final = (255, 255, 255, 255)


def decode_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """An upright picture in mode RGB, of the size that its header was read to have.

    Raises InvalidRequestError where the bytes are not one, or beyond the limits: then no pixel is decoded. Takes
    4 bytes a pixel; for a moment twice as much, with transparency four times.
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
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, _WHITE), over).convert("RGB")
