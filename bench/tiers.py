"""How fast the stores of tiers are, beside the least programs that move the same bytes; see bench/README.md.

scripts/bench tiers                        three minutes
scripts/bench tiers --folder /mnt/nvme --size-mib 512
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from measured import OthersCpu, print_table, provenance, write_result  # noqa: E402
from redis_servers import RedisServer  # noqa: E402
from tier_crossover import CHUNK_TOKENS, MODELS, ChainLoads, prefill_seconds, prefill_speeds  # noqa: E402
from tier_moves import MIB, Movers, median_gb_per_s, sealed_value, value_keys  # noqa: E402
from tier_places import (  # noqa: E402
    RAW,
    STORES,
    Place,
    Surroundings,
    flush,
    is_on_disk,
    make_cold,
    passes_by_memory,
    redis_benchmark,
)

from kvrelay_transfer.layout import KvLayout  # noqa: E402

SIZES_MIB = (1, 4, 8, 32)
CONNECTIONS = (1, 4, 8)
PART_BYTES = 4 * MIB
RECORD_PARTS = 8  # of the record that is moved alone
PROMPT_TOKENS = (256, 1024, 4096)
COLD = ", from disk"


def main() -> int:
    args = parse_args()
    others = OthersCpu()
    with (
        tempfile.TemporaryDirectory(prefix="kvrelay-bench-", dir=args.folder) as folder,
        RedisServer(Path(folder) / "redis") as redis,
    ):
        bench = TiersBench(args, Path(folder) / "values", redis.port)
        result: dict[str, Any] = {
            "provenance": provenance(),
            "settings": {"size_mib": args.size_mib, "repeats": args.repeats},
            "moves": bench.measure_all(),
            "records": bench.measure_records(),
            **bench.measure_crossover(),
        }
    result["others_cores"] = round(others.cores(), 2)
    path = write_result("tiers", result)
    print_result(result)
    print(f"\nwritten to {path.relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk that is to be measured")
    parser.add_argument("--size-mib", type=int, default=64, help="moved by each measurement, at least")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


class TiersBench:
    def __init__(self, args: argparse.Namespace, folder: Path, redis_port: int) -> None:
        self._size_bytes = args.size_mib * MIB
        self._repeats = args.repeats
        folder.mkdir()
        self._folder = folder
        self._redis_port = redis_port

    def measure_all(self) -> list[dict[str, Any]]:
        """A row for each way, size and number of connections."""
        rows = []
        for size_mib in SIZES_MIB:
            value = sealed_value(size_mib * MIB)
            for connections in CONNECTIONS:
                for name in (*RAW, *STORES):
                    rows += self._measure(name, value, connections)
                rows += self._measure_redis_benchmark(size_mib * MIB, connections)
                tell(rows)
        return rows

    def measure_records(self) -> list[dict[str, Any]]:
        """One record after another, each in parts: what a prompt waits for."""
        value = sealed_value(PART_BYTES)
        keys = value_keys(RECORD_PARTS)
        rows = []
        for name in STORES:
            with self._place(name, value, RECORD_PARTS) as place:
                for connections in CONNECTIONS:
                    with Movers(place, value, connections) as movers:
                        movers.put_s(keys)
                        seconds = [movers.get_s(keys) for _ in range(3 * self._repeats)]
                    rows.append({"way": name, "connections": connections, "get_ms": 1e3 * statistics.median(seconds)})
        return rows

    def measure_crossover(self) -> dict[str, Any]:
        compute_s, layout = prefill_seconds(PROMPT_TOKENS)
        token_bytes = layout.block_bytes // layout.block_tokens
        load_s: dict[str, dict[int, float]] = {}
        for name in STORES:
            load_s |= self._measure_loads(name, layout)
        largest = max(PROMPT_TOKENS)
        speeds = {way: largest * token_bytes / found[largest] / 1e9 for way, found in load_s.items()}
        return {
            "model": {"token_bytes": token_bytes, "chunk_tokens": CHUNK_TOKENS, "threads": torch.get_num_threads()},
            "compute_s": compute_s,
            "load_s": load_s,
            "load_gb_per_s": speeds,
            "prefill_tokens_per_s": {way: prefill_speeds(speed) for way, speed in speeds.items()},
        }

    def _measure_loads(self, name: str, layout: KvLayout) -> dict[str, dict[int, float]]:
        """Median seconds by way and tokens; of disks with the files in memory, and not."""
        largest = max(PROMPT_TOKENS)
        room_bytes = 2 * largest // layout.block_tokens * layout.block_bytes
        around = Surroundings(self._folder, self._redis_port, room_bytes, PART_BYTES)
        loads = ChainLoads(layout, largest, None if name == "host" else STORES[name](around))

        def seconds(count: int, is_cold: bool) -> float:
            if name != "host":
                loads.forget()
            if is_cold:
                make_cold(self._folder)
            return loads.load_s(count)

        found = {}
        for way in (name, name + COLD) if is_on_disk(name) else (name,):
            found[way] = {
                count: statistics.median(seconds(count, way != name) for _ in range(self._repeats))
                for count in PROMPT_TOKENS
            }
        loads.close()
        return found

    @contextlib.contextmanager
    def _place(self, name: str, value: memoryview, count: int) -> Iterator[Place]:
        """With room for so many values; it is empty before and after."""
        around = Surroundings(self._folder, self._redis_port, (count + 8) * (len(value) + 8192), len(value))
        place = STORES[name](around) if name in STORES else RAW[name](around)
        try:
            yield place
            place.clear()
        finally:
            place.close()

    def _measure(self, name: str, value: memoryview, connections: int) -> list[dict[str, Any]]:
        count = max(self._size_bytes // len(value), connections)
        keys = value_keys(count)
        moved_bytes = count * len(value)
        seconds: dict[str, list[float]] = {"put": [], "get": [], "get" + COLD: []}
        with self._place(name, value, count) as place, Movers(place, value, connections) as movers:
            movers.put_s(keys[:connections])
            movers.check(keys[0])
            for _ in range(self._repeats):
                place.clear()
                seconds["put"].append(movers.put_s(keys))
                if not passes_by_memory(name):
                    seconds["get"].append(movers.get_s(keys))
                if is_on_disk(name):
                    make_cold(self._folder)
                    seconds["get" + COLD].append(movers.get_s(keys))
        row = {"way": name, "size_mib": len(value) // MIB, "connections": connections}
        return [
            {**row, "what": what, "gb_per_s": median_gb_per_s(moved_bytes, found)}
            for what, found in seconds.items()
            if found
        ]

    def _measure_redis_benchmark(self, value_bytes: int, connections: int) -> list[dict[str, Any]]:
        row = {"way": "redis-benchmark", "size_mib": value_bytes // MIB, "connections": connections}
        count = max(self._size_bytes // value_bytes, 2 * connections)
        flush(self._redis_port)
        rows = []
        for what, operation in (("put", "set"), ("get", "get")):
            speeds = [
                redis_benchmark(self._redis_port, operation, value_bytes, connections, count)
                for _ in range(self._repeats)
            ]
            rows.append({**row, "what": what, "gb_per_s": statistics.median(speeds)})
        flush(self._redis_port)
        return rows


def tell(rows: list[dict[str, Any]]) -> None:
    """As they come: a run that is cut short has said something."""
    newest = rows[-1]
    for row in rows:
        if all(row[name] == newest[name] for name in ("size_mib", "connections")):
            print(
                f"{row['size_mib']} MiB x {row['connections']}: {row['way']} {row['what']} {row['gb_per_s']:.2f} GB/s",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"GB/s by {settings['size_mib']} MiB and more of values; {source['cpu']}, {source['cores']} cores, of which "
        f"others used {result['others_cores']}; commit {source['commit']}"
    )
    for what in ("put", "get", "get" + COLD):
        print(f"\n{what}:\n")
        print_table(("way", *(f"{size} MiB x{number}" for size, number in cells())), move_rows(result["moves"], what))
    print(f"\nOne record of {RECORD_PARTS} parts of {PART_BYTES // MIB} MiB, get, ms:\n")
    ways = list(dict.fromkeys(row["way"] for row in result["records"]))
    found = {(row["way"], row["connections"]): row["get_ms"] for row in result["records"]}
    header = ("store", *(f"x{number}" for number in CONNECTIONS))
    print_table(header, [(way, *(f"{found[way, number]:.1f}" for number in CONNECTIONS)) for way in ways])
    print_crossover(result)


def cells() -> list[tuple[int, int]]:
    return [(size, number) for size in SIZES_MIB for number in CONNECTIONS]


def move_rows(moves: list[dict[str, Any]], what: str) -> list[tuple[str, ...]]:
    speeds = {
        (row["way"], row["size_mib"], row["connections"]): row["gb_per_s"] for row in moves if row["what"] == what
    }
    ways = dict.fromkeys(way for way, _, _ in speeds)
    return [(way, *(f"{speeds[(way, *cell)]:.2f}" for cell in cells())) for way in ways]


def print_crossover(result: dict[str, Any]) -> None:
    ways = list(result["load_s"])
    print("\nms to have the KV of a prompt, by computing (relay's model, this CPU) and by a fetch from tiers:\n")
    rows = [
        (
            str(count),
            f"{1e3 * result['compute_s'][count]:.0f}",
            *(f"{1e3 * result['load_s'][way][count]:.1f}" for way in ways),
        )
        for count in PROMPT_TOKENS
    ]
    print_table(("tokens", "computing", *ways), rows)
    print("\nTokens per second up to which computing is slower than such a fetch, KV in 16 bits:\n")
    header = ("model", *(f"{way}, {result['load_gb_per_s'][way]:.2f} GB/s" for way in ways))
    limits = result["prefill_tokens_per_s"]
    print_table(header, [(model, *(f"{limits[way][model]:.0f}" for way in ways)) for model in MODELS])


if __name__ == "__main__":
    sys.exit(main())
