"""How fast each connector moves scattered KV blocks between processes, beside a plain copy; see bench/README.md.

scripts/bench transfer                          two GPUs: cuda_ipc, nixl, ucx; none: shm, nixl, ucx
scripts/bench transfer --connectors cuda_ipc --size-mib 512 --no-decode
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402
from transfer_decode import DecodeStep  # noqa: E402
from transfer_device import DeviceWays, LinkFeed, device_ways, spin, until_fired  # noqa: E402
from transfer_minimal_nixl import minimal_nixl  # noqa: E402
from transfer_minimal_ucx import minimal_ucx  # noqa: E402

from kvrelay_cli.transfer.pair import Pair  # noqa: E402
from kvrelay_cli.transfer.source import Source  # noqa: E402
from kvrelay_core.errors import ConfigError, DeadlineError, TransferError, UnavailableError  # noqa: E402

# The blocks of Llama-3.1-8B with 16 and 64 tokens are the last two.
SPAN_SIZES = (16 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20)
DECODE_STEPS = 128
DECODE_SPAN_SIZES = (2 << 20,)
POSTING_CYCLES = 100_000_000  # 50 ms
STREAM_REPEATS = 6  # each with so long a wait
# One hand-off of 512 MiB for so many steps is 14 requests a second of 4096 tokens.
STEPS_PER_HANDOFF = 16
MINIMAL_PROGRAMS = {"nixl": minimal_nixl, "ucx": minimal_ucx}  # by the connector's name
# Measured before the rows that they are compared with.
PLAIN_COPIES = ("raw peer copy", "memcpy", "minimal nixl program", "minimal ucx program")


def main() -> int:
    args = parse_args()
    bench = TransferBench(args)
    rows: list[dict[str, Any]] = []
    for name in args.connectors:
        rows += bench.measure_connector(name)
    decode = bench.measure_decode() if args.decode else []
    result = {
        "provenance": {**provenance(), "gpus": gpu_names()},
        "settings": {"size_mib": args.size_mib, "repeats": args.repeats},
        "transfers": rows,
        "decode": decode,
    }
    path = write_result("transfer", result)
    print_result(result)
    print(f"\nwritten to {path.relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    num_gpus = torch.cuda.device_count()
    on_gpus = num_gpus > 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connectors", type=lambda text: text.split(","), help="by name; all that fit by default")
    parser.add_argument("--size-mib", type=int, default=512 if on_gpus else 128, help="moved by each measurement")
    parser.add_argument("--repeats", type=int, default=12 if on_gpus else 5)
    parser.add_argument("--source-device", default=("cpu", "cuda:0", "cuda:1")[min(num_gpus, 2)])
    parser.add_argument("--reader-device", default="cuda:0" if on_gpus else "cpu")
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=on_gpus)
    args = parser.parse_args()
    args.connectors = args.connectors or (["cuda_ipc", "nixl", "ucx"] if on_gpus else ["shm", "nixl", "ucx"])
    args.decode = args.decode and "cuda_ipc" in args.connectors
    return args


def gpu_names() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


class TransferBench:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._size_bytes = args.size_mib << 20
        self._minimal: dict[str, dict[int, float]] = {}  # seconds by span, by connector

    def measure_connector(self, name: str) -> list[dict[str, Any]]:
        """A row for each span and way; one row with the reason where it cannot run here."""
        source = Source(self._args.source_device)
        rows = []
        try:
            for span_bytes in SPAN_SIZES:
                with tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp") as folder:
                    pair = self._pair(name, source, span_bytes, folder)
                    try:
                        rows += tell(self._measure_pair(name, pair, span_bytes))
                    finally:
                        pair.close()
        except (ConfigError, TransferError, UnavailableError, DeadlineError) as error:
            rows.append({"way": name, "skipped": str(error)})
        finally:
            source.close()
        return rows

    def _pair(self, name: str, source: Source, span_bytes: int, folder: str) -> Pair:
        return Pair(name, source, span_bytes, self._size_bytes, self._args.reader_device, Path(folder))

    def _measure_pair(self, name: str, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        pair.read_in_pieces()
        pair.check()
        rows = []
        if name in MINIMAL_PROGRAMS:
            rows.append(self._row(f"minimal {name} program", span_bytes, self._minimal_s(name, span_bytes)))
        if name == "cuda_ipc":
            rows += self._measure_device_copies(pair, span_bytes)
        elif name == "shm":
            rows.append(self._row("memcpy", self._size_bytes, self._time(self._memcpy())))
        common = {"probe_gb_per_s": pair.link.probed_gb_per_s(), "connect_ms": 1e3 * pair.connect_s}
        pair.side.memory.tensor.zero_()
        rows.append(
            {**self._row(f"{name}, as the engine reads", span_bytes, self._time(pair.read_in_pieces)), **common}
        )
        pair.check()
        rows.append(self._row(f"{name}, one read", span_bytes, self._time(pair.read_all)))
        return rows

    def _minimal_s(self, name: str, span_bytes: int) -> float:
        if name not in self._minimal:
            devices = (self._args.source_device, self._args.reader_device)
            self._minimal[name] = MINIMAL_PROGRAMS[name](SPAN_SIZES, self._size_bytes, *devices, self._args.repeats)
        return self._minimal[name][span_bytes]

    def _measure_device_copies(self, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        """One contiguous copy, and the ways of copying spans: from post to event, and on the GPU's clock."""
        with device_ways(pair) as ways:
            posts: dict[str, Callable[[], torch.cuda.Event]] = {
                "raw peer copy": ways.plain, "copy engines": ways.by_engines, "kernel": ways.by_kernel,
                "kernel, rows of 4 KiB": ways.by_rows,
            }  # fmt: skip
            return [self._measure_post(pair, ways, way, post, span_bytes) for way, post in posts.items()]

    def _measure_post(
        self, pair: Pair, ways: DeviceWays, way: str, post: Callable[[], torch.cuda.Event], span_bytes: int
    ) -> dict[str, Any]:
        pair.side.memory.tensor.zero_()
        torch.cuda.synchronize()
        device_s = self._time_stream(ways.copier, post)
        if post != ways.plain:
            pair.check()
        seconds = self._time(functools.partial(spin, pair, post))
        return {
            **self._row(way, span_bytes, seconds), "device_ms": 1e3 * device_s,
            "device_gb_per_s": self._size_bytes / device_s / 1e9,
        }  # fmt: skip

    def _time(self, act: Callable[[], None]) -> float:
        """Median of wall-clock seconds."""
        times_s = []
        for _ in range(self._args.repeats):
            started_s = time.perf_counter()
            act()
            times_s.append(time.perf_counter() - started_s)
        return statistics.median(times_s[1:])

    def _time_stream(self, copier: Any, post: Callable[[], object]) -> float:
        """Median of seconds between events around what `post` posts. Posting may take longer than copying: the stream
        is kept busy until all is posted, the last time by a copy like it: an idle link takes a moment to wake up."""
        times_s: list[float] = []
        for _ in range(min(self._args.repeats, STREAM_REPEATS)):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(copier.stream):
                torch.cuda._sleep(POSTING_CYCLES)  # type: ignore[no-untyped-call]
            post()
            begin.record(copier.stream)
            post()
            end.record(copier.stream)
            copier.stream.synchronize()
            times_s.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times_s[1:])

    def _memcpy(self) -> Callable[[], None]:
        source, destination = np.ones(self._size_bytes, np.uint8), np.ones(self._size_bytes, np.uint8)
        return lambda: void(ctypes.memmove(destination.ctypes.data, source.ctypes.data, self._size_bytes))

    def _row(self, way: str, span_bytes: int, seconds: float) -> dict[str, Any]:
        return {
            "way": way, "span_bytes": span_bytes, "ms": 1e3 * seconds, "gb_per_s": self._size_bytes / seconds / 1e9,
        }  # fmt: skip

    # ----------------------------------------------------------------------------- beside decode steps

    def measure_decode(self) -> list[dict[str, Any]]:
        step = DecodeStep(torch.device(self._args.reader_device))
        step.median_ms(DECODE_STEPS)
        rows = []
        source = Source(self._args.source_device)
        for span_bytes in DECODE_SPAN_SIZES:
            with tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp") as folder:
                pair = self._pair("cuda_ipc", source, span_bytes, folder)
                try:
                    rows += self._measure_beside(step, pair, span_bytes)
                finally:
                    pair.close()
        source.close()
        return rows

    def _measure_beside(self, step: DecodeStep, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        with device_ways(pair) as ways:
            engines, kernel = until_fired(ways.by_engines), until_fired(ways.by_kernel)
            loads = {
                "copy engines, link never idle": LinkFeed(pair, engines, at_once=8, every=1),
                "kernel, link never idle": LinkFeed(pair, kernel, at_once=8, every=1),
                "copy engines, every 16 steps": LinkFeed(pair, engines, at_once=1, every=STEPS_PER_HANDOFF),
                "kernel, every 16 steps": LinkFeed(pair, kernel, at_once=1, every=STEPS_PER_HANDOFF),
                "cuda_ipc reads, every 16 steps": LinkFeed(pair, pair.post_all, at_once=1, every=STEPS_PER_HANDOFF),
            }
            return [self._beside(step, load, feed, span_bytes) for load, feed in loads.items()]

    def _beside(self, step: DecodeStep, load: str, feed: LinkFeed, span_bytes: int) -> dict[str, Any]:
        before_ms = step.mean_ms(DECODE_STEPS)
        started_s = time.perf_counter()
        beside_ms = step.mean_ms(DECODE_STEPS, feed.keep_going)
        feed.finish()
        seconds = time.perf_counter() - started_s
        after_ms = step.mean_ms(DECODE_STEPS)
        alone_ms = (before_ms + after_ms) / 2
        return {
            "load": load, "span_bytes": span_bytes, "step_ms": alone_ms, "step_spread_ms": abs(before_ms - after_ms),
            "beside_ms": beside_ms, "slower": beside_ms / alone_ms - 1,
            "ms_per_copy": (beside_ms - alone_ms) * DECODE_STEPS / feed.num_posted,
            "moved_gb_per_s": feed.num_posted * self._size_bytes / seconds / 1e9,
        }  # fmt: skip


def tell(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they come: a run that is cut short has said something."""
    for row in rows:
        print(f"{row['span_bytes'] >> 10} KiB, {row['way']}: {row['ms']:.3f} ms", file=sys.stderr, flush=True)
    return rows


def void(_: object) -> None:
    pass


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"{settings['size_mib']} MiB in scattered spans, process to process; {source['gpus'] or 'no GPU'}; "
        f"{source['cpu']}, {source['cores']} cores; commit {source['commit']}\n"
    )
    rows: list[tuple[str, ...]] = []
    plain: dict[str, Any] = {}
    for row in result["transfers"]:
        plain = row if row["way"] in PLAIN_COPIES else plain
        rows.append(transfer_cells(row, plain))
    header = ("ms from post to done", "GB/s", "of the plain one", "ms on the GPU's clock", "of the plain one")
    print_table(("span KiB", "way", *header), rows)
    if result["decode"]:
        print("\nDecode steps (batch 32, all weights and 4 GiB of KV read) beside reads of 512 MiB on the same GPU:\n")
        print_table(
            ("span KiB", "load", "step ms", "beside ms", "slower", "ms for each copy", "moved GB/s"),
            decode_cells(result["decode"]),
        )


def transfer_cells(row: dict[str, Any], plain: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in row:
        return ("", row["way"], "", "", f"skipped: {row['skipped']}", "", "")
    share = f"{row['gb_per_s'] / plain['gb_per_s']:.1%}" if plain else ""
    cells = (f"{row['span_bytes'] >> 10}", row["way"], f"{row['ms']:.3f}", f"{row['gb_per_s']:.1f}", share)
    if "device_ms" not in row:
        return (*cells, "", "")
    return (*cells, f"{row['device_ms']:.3f}", f"{row['device_gb_per_s'] / plain['device_gb_per_s']:.1%}")


def decode_cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['span_bytes'] >> 10}",
            row["load"],
            f"{row['step_ms']:.3f}",
            f"{row['beside_ms']:.3f}",
            f"{row['slower']:.1%}",
            f"{row['ms_per_copy']:.3f}",
            f"{row['moved_gb_per_s']:.0f}",
        )
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
