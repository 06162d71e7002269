"""`kvrelay bench transfer`: how fast each connector moves scattered KV blocks between two processes here.

The source is a process of its own, the reader this one. Imports torch only when it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from kvrelay_cli import flag_types
from kvrelay_cli.flags import CONNECTORS
from kvrelay_cli.table import lines_of
from kvrelay_core.errors import ConfigError, InternalError, KvRelayError

if TYPE_CHECKING:
    from kvrelay_cli.transfer.measure import Devices, Row

DEVICE_OF = {"shm": "cpu", "cuda_ipc": "cuda"}
SPANS_KIB = (16, 128, 2048, 8192)
MIN_SPAN_KIB = 4

EPILOG = """\
Blocks of each size lie scattered in both pools and move in reads that suit the connector, as in an engine. Every
read's bytes and fence words are verified. GB/s are 10^9 bytes a second and medians; `first` is the first read into a
new pool, which touches every page. `of memcpy` is the share of a plain copy that is made in turn with the reads: a
memcpy by one core, between GPUs a copy of contiguous memory.

examples:
  kvrelay bench transfer
  kvrelay bench transfer --connector shm,grpc --size-mib 256 --span-kib 128,8192
  kvrelay bench transfer --device cuda --json > transfer.json
"""


def connector_names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = [name for name in CONNECTORS if name != "auto"]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong) or text!r} is no connector; there are {', '.join(known)}")
    return names


def span_sizes(text: str) -> tuple[int, ...]:
    """In KiB."""
    sizes = flag_types.integers(text)
    if not sizes or any(size < MIN_SPAN_KIB or size & (size - 1) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of powers of two from {MIN_SPAN_KIB}, such as 16,128")
    return sizes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvrelay bench transfer",
        description="Measures how fast each connector moves KV blocks between two processes on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--connector", type=connector_names, metavar="NAME,...", help="default: all that suit the device"
    )
    parser.add_argument(
        "--size-mib", type=flag_types.integer(1), default=64, metavar="N", help="moved by each measurement (default 64)"
    )
    parser.add_argument(
        "--span-kib",
        type=span_sizes,
        default=SPANS_KIB,
        metavar="N,...",
        help="sizes of a block, powers of two (default 16,128,2048,8192)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the pools lie (default: cuda if there is one)")
    parser.add_argument("--repeats", type=flag_types.integer(1), default=5, metavar="N", help="default 5")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main(words: Sequence[str]) -> int:
    args = build_parser().parse_args(words)
    if max(args.span_kib) > args.size_mib << 10:
        raise ConfigError(f"a span of {max(args.span_kib)} KiB is larger than --size-mib {args.size_mib}; raise it")
    device = choose_device(args.device)
    names = args.connector or suitable(device)
    rows, skipped = measure_all(names, device, args)
    if args.json:
        print(json.dumps(result_of(rows, skipped, device, args)))
    elif rows:
        print("\n".join(table_of(rows, device)))
    if (args.connector and skipped) or not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ConfigError(f"not every connector could be measured: {reasons}")
    return 0


def choose_device(wanted: str | None) -> str:
    """Raises ConfigError where it is not there."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("connectors need torch, which is not installed: pip install 'kvrelay[engine]'")
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def suitable(device: str) -> tuple[str, ...]:
    return tuple(name for name in CONNECTORS if name != "auto" and DEVICE_OF.get(name, device) == device)


def measure_all(names: Sequence[str], device: str, args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The rows, and of each connector that does not work here the reason."""
    from kvrelay_cli.transfer.measure import devices_for

    devices = devices_for(device)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            rows += measure_one(name, devices, args)
        except InternalError:
            raise
        except KvRelayError as error:
            skipped[name] = error.message
            tell(f"{name}: left out: {error.message}")
    return rows, skipped


def measure_one(name: str, devices: Devices, args: argparse.Namespace) -> list[Row]:
    from kvrelay_cli.transfer.measure import measure_spans
    from kvrelay_cli.transfer.source import Source

    tell(f"{name}: {devices.source} to {devices.reader} ...")
    rows = []
    sizes = [size_kib << 10 for size_kib in args.span_kib]
    source = Source(devices.source)
    try:
        for row in measure_spans(name, source, devices, sizes, args.size_mib << 20, args.repeats):
            tell(f"{name}: spans of {row.span_bytes >> 10} KiB: {row.gb_per_s:.2f} GB/s")
            rows.append(row)
    finally:
        source.close()
    return rows


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table_of(rows: Sequence[Row], device: str) -> list[str]:
    plain = "memcpy" if device == "cpu" else "raw copy"
    header = (
        "connector",
        "span KiB",
        "GB/s",
        f"of {plain}",
        f"{plain} GB/s",
        "first GB/s",
        "one span ms",
        "connect ms",
    )
    cells = [
        (
            row.connector, f"{row.span_bytes >> 10}", f"{row.gb_per_s:.2f}", f"{row.share_of_plain:.0%}",
            f"{row.plain_gb_per_s:.2f}", f"{row.first_gb_per_s:.2f}", f"{1e3 * row.one_span_s:.3f}",
            f"{1e3 * row.connect_s:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    return lines_of(header, cells)


def result_of(rows: Sequence[Row], skipped: dict[str, str], device: str, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "version": version("kvrelay"),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "size_mib": args.size_mib,
        "repeats": args.repeats,
        "rows": [{**msgspec.to_builtins(row), "share_of_plain": row.share_of_plain} for row in rows],
        "skipped": skipped,
    }
