"""`kvrelay cache`: what lies in the tiers that workers share, on disk and in Redis. Needs no worker and no GPU."""

from __future__ import annotations

import argparse
import json
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvrelay_cli.progress import ProgressBar
from kvrelay_cli.table import lines_of
from kvrelay_cli.tier_flags import add_shared_tier_flags, tier_config
from kvrelay_core.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from kvrelay_transfer.tiers.part_store import PartStore

EPILOG = """\
Give the same --disk-cache, --redis-url and --cache-secret-file as to the workers. What host memory holds, each worker
shows: `kvrelay doctor --target HOST:PORT`.

examples:
  kvrelay cache stats  --disk-cache /var/cache/kvrelay:20GiB
  kvrelay cache verify --redis-url redis://cache.local:6379 --redis-password-file redis.pw
  kvrelay cache clear  --redis-url redis://cache.local:6379 --redis-password-file redis.pw
"""

GIB = 2**30
_LARGEST_PART_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("stats", "clear", "verify"),
        help="stats: what there is; clear: remove it all; verify: read every part, and exit 1 if any is bad",
    )
    add_shared_tier_flags(parser)
    parser.add_argument(
        "--remove-bad",
        action="store_true",
        help="with verify: remove what is bad; with another --cache-secret-file than the workers', that is everything",
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    from kvrelay_transfer.tiers.make import make_stores

    config = tier_config(args)
    stores = make_stores(config)
    if not stores:
        raise ConfigError("say which tiers: --disk-cache DIR:SIZE, --redis-url URL, or both")
    secret = config.read_secret()
    try:
        if args.action == "verify":
            return _report_verified({store.name: verify(store, secret, args.remove_bad) for store in stores}, args.json)
        rows = {store.name: clear(store) if args.action == "clear" else stats(store) for store in stores}
    finally:
        for store in stores:
            store.close()
    _print(rows, args.json)
    return 0


def stats(store: PartStore) -> dict[str, float]:
    with _translated(store):
        usage = store.usage()
    sizes = {"GiB": usage.used_bytes, "of GiB": usage.capacity_bytes}
    return {"parts": usage.num_parts, **{name: round(size / GIB, 3) for name, size in sizes.items()}}


def clear(store: PartStore) -> dict[str, float]:
    with _translated(store):
        return {"removed": store.clear()}


def verify(store: PartStore, secret: bytes, removes_bad: bool) -> Counter[str]:
    """How many parts are good, or what else they are."""
    from kvrelay_transfer.tiers.part_format import BadPart, open_part

    room = memoryview(mmap.mmap(-1, _LARGEST_PART_BYTES))  # takes memory as far as parts are long
    found: Counter[str] = Counter({"good": 0, **{bad.value: 0 for bad in BadPart}, "gone": 0})
    size_bytes = 0
    with _translated(store), ProgressBar(store.name, store.usage().num_parts) as bar:
        for done, key in enumerate(store.keys()):
            bar.show(done, size_bytes)
            length = store.get(key, room)
            if length is None:
                found["gone"] += 1  # evicted meanwhile
                continue
            size_bytes += length
            opened = open_part(key, room[:length], secret)
            found[opened.value if isinstance(opened, BadPart) else "good"] += 1
            if removes_bad and isinstance(opened, BadPart):
                store.remove(key)
    return found


def _report_verified(found: dict[str, Counter[str]], as_json: bool) -> int:
    _print(found, as_json)
    return 1 if any(number for counts in found.values() for what, number in counts.items() if what in _BAD) else 0


_BAD = ("truncated", "foreign", "damaged")


def _print(rows: Mapping[str, Mapping[str, float]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    header = ("tier", *next(iter(rows.values())))
    print(*lines_of(header, [(name, *map(str, row.values())) for name, row in rows.items()]), sep="\n")


@contextmanager
def _translated(store: PartStore) -> Iterator[None]:
    from kvrelay_transfer.tiers.part_store import StoreError

    try:
        yield
    except StoreError as error:
        raise UnavailableError(f"{store.name} does not answer: {error}") from error
