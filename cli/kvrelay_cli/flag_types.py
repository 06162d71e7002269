"""Values of flags: text in, checked value out. Every message says what would be accepted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            raise argparse.ArgumentTypeError(f"{value} must be {bounds}")
        return value

    return parse


def number(minimum: float, maximum: float | None = None) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        # Written so that NaN fails too.
        if not (value >= minimum and (maximum is None or value <= maximum)):
            bounds = f"at least {minimum:g}" if maximum is None else f"between {minimum:g} and {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def size(text: str) -> int:
    """Bytes: 4GiB, 512MiB, 1.5TiB, or a number of them."""
    number, unit = text[:-3], text[-3:]
    if unit not in _UNITS:
        number, unit = text, ""
    try:
        value = float(number) * _UNITS.get(unit, 1)
        if not 1 <= value < 1 << 60:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GiB or 512MiB") from None
    return int(value)


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class SizedFolder(NamedTuple):
    path: str
    size_bytes: int


def sized_folder(text: str) -> str:
    """The text itself, which `split_sized_folder` takes apart."""
    split_sized_folder(text)
    return text


def split_sized_folder(text: str) -> SizedFolder:
    path, colon, size_text = text.rpartition(":")
    if not colon or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR:SIZE, such as /var/cache/kvrelay:20GiB")
    return SizedFolder(path, size(size_text))


port = integer(0, 65535)


def address(text: str) -> str:
    host, colon, port_text = text.rpartition(":")
    if not colon or not host or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:50051")
    return text


def addresses(text: str) -> tuple[str, ...]:
    return tuple(address(part.strip()) for part in text.split(",") if part.strip())


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def integers(text: str) -> tuple[int, ...]:
    """Comma-separated, such as `1,2,3`; the empty text is no number at all."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,3") from None


def device_indices(text: str) -> tuple[int, ...]:
    found = integers(text)
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of device numbers such as 0 or 0,1")
    return found


def device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cpu, cuda or cuda:N")
    return text


def logit_bias(text: str) -> tuple[int, float]:
    token_id, equals, bias = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN_ID=BIAS, such as 42=-1.5") from None
