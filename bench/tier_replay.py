"""How much of a trace of conversations host memory would have, by its size and its order of eviction.

scripts/bench tier_replay --trace conversation_trace.jsonl
scripts/bench tier_replay --trace FILE --tokens 1e6 3e6 10e6 25e6 --eviction lru s3_fifo

A line of the trace is a request: timestamp (ms), input_length (tokens) and hash_ids, one for each 512 tokens, as in the
traces that were published with Mooncake (FAST 2025). Requests come in the trace's order, and no time passes: a request
finds the blocks before it, touches them, and leaves its own full blocks. The store is the one that workers have, over
slots that nobody writes to. The hit rate is in tokens of all inputs.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

from curves import draw_curves  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402

from kvrelay_transfer.tiers.eviction import Eviction, Lru  # noqa: E402
from kvrelay_transfer.tiers.host_slab import HostSlab  # noqa: E402
from kvrelay_transfer.tiers.host_store import HostStore  # noqa: E402
from kvrelay_transfer.tiers.part_key import DIGEST_BYTES, NAMESPACE_BYTES, PartKey  # noqa: E402
from kvrelay_transfer.tiers.s3_fifo import S3Fifo  # noqa: E402

BLOCK_TOKENS = 512
EVICTIONS: dict[str, Callable[[], Eviction[PartKey]]] = {"lru": Lru, "s3_fifo": S3Fifo}
TOKENS = (1e6, 3e6, 10e6, 25e6)
NAMESPACE = bytes(NAMESPACE_BYTES)


class Request(Struct, frozen=True):
    input_length: int
    hash_ids: tuple[int, ...]

    @property
    def full_blocks(self) -> tuple[int, ...]:
        return self.hash_ids[: self.input_length // BLOCK_TOKENS]


def read_trace(path: Path) -> Iterator[Request]:
    with path.open() as lines:
        for line in lines:
            fields: dict[str, Any] = json.loads(line)
            yield Request(fields["input_length"], tuple(fields["hash_ids"]))


def key_of(hash_id: int) -> PartKey:
    return PartKey(NAMESPACE, struct.pack("<Q", hash_id).ljust(DIGEST_BYTES, b"\0"), 0)


def infinite_hit_rate(requests: Iterable[Request]) -> float:
    """With room for everything."""
    seen: set[int] = set()
    num_hits = num_tokens = 0
    for request in requests:
        blocks = request.full_blocks
        num_hits += next((index for index, block in enumerate(blocks) if block not in seen), len(blocks))
        num_tokens += request.input_length
        seen.update(blocks)
    return num_hits * BLOCK_TOKENS / num_tokens


def hit_rate(requests: Iterable[Request], capacity_tokens: float, eviction: Eviction[PartKey]) -> float:
    slot_bytes = HostSlab(1, 1).slot_bytes
    store = HostStore(HostSlab(int(capacity_tokens / BLOCK_TOKENS) * slot_bytes, 1), eviction)
    num_hits = num_tokens = 0
    for request in requests:
        keys = list(map(key_of, request.full_blocks))
        num_tokens += request.input_length
        num_hits += _touch(store, keys)
        _leave(store, keys)
    store.close()
    return num_hits * BLOCK_TOKENS / num_tokens


def _touch(store: HostStore, keys: Sequence[PartKey]) -> int:
    """How many of the first ones are there."""
    num_found = store.num_leading(keys)
    for key in keys[:num_found]:
        borrow = store.borrow(key)
        assert borrow is not None
        borrow.give_back()
    return num_found


def _leave(store: HostStore, keys: Sequence[PartKey]) -> None:
    for key in keys:
        if key in store:
            continue
        slot = store.reserve(1)
        assert slot is not None, "nobody borrows anything"
        store.publish(slot, key, 1, 1).give_back()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=float, nargs="+", default=TOKENS, metavar="N", help="sizes of host memory")
    parser.add_argument("--eviction", nargs="+", choices=EVICTIONS, default=tuple(EVICTIONS))
    args = parser.parse_args()
    requests = list(read_trace(args.trace))
    best = infinite_hit_rate(requests)
    rates: dict[str, list[float]] = {}
    for name in args.eviction:
        started_s = time.monotonic()
        rates[name] = [hit_rate(requests, tokens, EVICTIONS[name]()) for tokens in args.tokens]
        print(f"{name}: {time.monotonic() - started_s:.1f} s", file=sys.stderr)
    header = ["million tokens", *(f"{name}, of infinite" for name in rates), *(f"{name}, hit rate" for name in rates)]
    print_table(
        header,
        [
            [f"{tokens / 1e6:g}", *(f"{rate[row] / best:.1%}" for rate in rates.values())]
            + [f"{rate[row]:.1%}" for rate in rates.values()]
            for row, tokens in enumerate(args.tokens)
        ],
    )
    print(f"\n{len(requests)} requests; with room for everything {best:.1%} of all input tokens are hits")
    result = {
        "provenance": provenance(), "trace": args.trace.name, "requests": len(requests), "infinite_hit_rate": best,
        "tokens": list(args.tokens), "hit_rates": rates,
    }  # fmt: skip
    path = write_result("tier_replay", result)
    curves = {name: [100 * rate / best for rate in of_name] for name, of_name in rates.items()}
    plot = path.with_suffix(".svg")
    plot.write_text(
        draw_curves([tokens / 1e6 for tokens in args.tokens], curves, "million tokens", "% of an infinite cache's hits")
    )
    print(f"{path}\n{plot}")


if __name__ == "__main__":
    main()
