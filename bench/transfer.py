"""How fast each connector moves scattered KV blocks between processes, beside a plain copy; see bench/README.md.

scripts/bench transfer                          two GPUs: cuda_ipc, nixl, ucx; none: shm, nixl, ucx
scripts/bench transfer --connectors cuda_ipc --size-mib 512 --no-decode
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402
from transfer_decode import DecodeStep  # noqa: E402
from transfer_source import PERIOD, Side, Source, Spans  # noqa: E402

from kvrelay_core.errors import ConfigError, TransferError  # noqa: E402
from kvrelay_transfer.connectors.base import PeerInfo, PeerLink, Transfer, TransferState  # noqa: E402
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector, CudaIpcEndpoint  # noqa: E402
from kvrelay_transfer.connectors.device_copy import MappedPool, merge_runs  # noqa: E402
from kvrelay_transfer.layout import KvLayout  # noqa: E402

# Block tokens and layers of Llama-3.1-8B's shape by span; its own blocks of 16 and 64 tokens are the last two.
LAYOUTS = {
    span: KvLayout("bfloat16", num_layers=layers, num_kv_heads=8, block_tokens=tokens, head_dim=128)
    for span, layers, tokens in (
        (16 << 10, 4, 1), (128 << 10, 32, 1), (512 << 10, 32, 4), (2 << 20, 32, 16), (8 << 20, 32, 64),
    )
}  # fmt: skip
PIECE_BYTES = 32 << 20  # one read of the engine, which keeps four under way
PIECES_UNDER_WAY = 4
DEADLINE_S = 60.0
DECODE_STEPS = 200
POSTING_CYCLES = 100_000_000  # 50 ms
# One hand-off of 512 MiB for so many steps is 14 requests a second of 4096 tokens.
STEPS_PER_HANDOFF = 16
PLAIN_COPIES = ("raw peer copy", "memcpy")  # measured before the rows that they are compared with


def main() -> int:
    args = parse_args()
    bench = TransferBench(args)
    rows: list[dict[str, Any]] = []
    for name in args.connectors:
        rows += bench.measure_connector(name)
    decode = bench.measure_decode() if args.decode else []
    result = {
        "provenance": {**provenance(), "devices": device_names()},
        "settings": {"size_mib": args.size_mib, "repeats": args.repeats},
        "transfers": rows,
        "decode": decode,
    }
    print_result(result)
    print(f"\nwritten to {write_result('transfer', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    num_gpus = torch.cuda.device_count()
    on_gpus = num_gpus > 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connectors", type=lambda text: text.split(","), help="by name; all that fit by default")
    parser.add_argument("--size-mib", type=int, default=512 if on_gpus else 128, help="moved by each measurement")
    parser.add_argument("--repeats", type=int, default=20 if on_gpus else 5)
    parser.add_argument("--source-device", default=("cpu", "cuda:0", "cuda:1")[min(num_gpus, 2)])
    parser.add_argument("--reader-device", default="cuda:0" if on_gpus else "cpu")
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=on_gpus)
    args = parser.parse_args()
    args.connectors = args.connectors or (["cuda_ipc", "nixl", "ucx"] if on_gpus else ["shm", "nixl", "ucx"])
    args.decode = args.decode and "cuda_ipc" in args.connectors
    return args


def device_names() -> str:
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "no GPU"


class Pair:
    """A source's pool, ours, a link between them, and which blocks to move."""

    def __init__(self, name: str, source: Source, span_bytes: int, args: argparse.Namespace, folder: Path) -> None:
        self.layout = LAYOUTS[span_bytes]
        self.size_bytes = args.size_mib << 20
        num_spans = self.size_bytes // span_bytes
        # Half of the source's blocks, no two neighbours in the same order on both sides.
        generator = random.Random(span_bytes)
        remote = generator.sample(range(1, 2 * num_spans + 1), num_spans)
        local = generator.sample(range(1, num_spans + 1), num_spans)
        self.spans = Spans(self.layout, tuple(remote), tuple(local))
        self.peer: PeerInfo = source.open(self.layout, 2 * num_spans + 1)
        self.side = Side(name, self.layout, num_spans + 1, args.reader_device, folder)
        try:
            started_s = time.perf_counter()
            self.link: PeerLink = self.side.connect(self.peer)
            self.connect_s = time.perf_counter() - started_s
            wait(lambda: self.link.probed_gb_per_s() is not None)
        except BaseException:
            self.side.close()
            raise

    def read_all(self) -> None:
        """In one read."""
        finish([self.link.read(self.spans.read(self.peer))])

    def read_in_pieces(self) -> None:
        """As the engine does."""
        step = max(1, PIECE_BYTES // self.layout.block_bytes)
        under_way: list[Transfer] = []
        for first in range(0, len(self.spans.remote), step):
            if len(under_way) == PIECES_UNDER_WAY:
                finish([under_way.pop(0)])
            under_way.append(self.link.read(self.spans.read(self.peer, first, first + step)))
        finish(under_way)

    def check(self) -> None:
        """Every byte is where it belongs."""
        rows = self.side.memory.block_rows[list(self.spans.local)]
        expected = torch.tensor([block % PERIOD for block in self.spans.remote], dtype=torch.uint8, device=rows.device)
        if not bool((rows == expected[:, None]).all()):
            raise SystemExit("the blocks that arrived are not those that were sent; nothing was measured")

    def close(self) -> None:
        self.link.close()
        self.side.close()


class TransferBench:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._size_bytes = args.size_mib << 20

    def measure_connector(self, name: str) -> list[dict[str, Any]]:
        """A row for each span and way; one row with the reason where it cannot run here."""
        source = Source(name, self._args.source_device)
        rows = []
        try:
            for span_bytes in LAYOUTS:
                with tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp") as folder:
                    pair = Pair(name, source, span_bytes, self._args, Path(folder))
                    try:
                        rows += self._measure_pair(name, pair, span_bytes)
                    finally:
                        pair.close()
        except (ConfigError, TransferError) as error:
            rows.append({"way": name, "skipped": str(error)})
        finally:
            source.close()
        return rows

    def _measure_pair(self, name: str, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        pair.read_all()
        pair.check()
        rows = []
        if name == "cuda_ipc":
            rows += self._measure_device_copies(pair, span_bytes)
        elif name == "shm":
            rows.append(self._row("memcpy", self._size_bytes, self._time(self._memcpy())))
        common = {"probe_gb_per_s": pair.link.probed_gb_per_s(), "connect_ms": 1e3 * pair.connect_s}
        rows.append({**self._row(f"{name}, one read", span_bytes, self._time(pair.read_all)), **common})
        rows.append(self._row(f"{name}, reads of 32 MiB", span_bytes, self._time(pair.read_in_pieces)))
        pair.check()
        return rows

    def _measure_device_copies(self, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        """On the GPU's clock: one contiguous copy, and both ways of copying spans."""
        connector = pair.side.connector
        assert isinstance(connector, CudaIpcConnector)
        copier, runtime = connector.copier, connector.runtime
        endpoint = msgspec.msgpack.decode(pair.peer.offers[0].endpoint, type=CudaIpcEndpoint)
        source = MappedPool(runtime.open(endpoint.ipc_handle, connector.device_index), pair.layout.block_bytes)
        flat = pair.side.memory.block_rows.view(-1)[: self._size_bytes]
        remote, local = pair.spans.remote, pair.spans.local
        runs = merge_runs(np.array(remote), np.array(local))
        ways: dict[str, Callable[[], object]] = {
            "raw peer copy": lambda: copier.copy_span(source.address, flat),
            "copy engines": lambda: copier.copy_by_engines(source, *runs),
            "kernel": lambda: copier.copy_by_kernel(source, remote, local),
        }
        rows = [
            self._row(way, self._size_bytes if way == "raw peer copy" else span_bytes, self._time_stream(copier, post))
            for way, post in ways.items()
        ]
        runtime.close(source.address, connector.device_index)
        pair.read_all()
        return rows

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
        is kept busy until all is posted."""
        times_s: list[float] = []
        for _ in range(self._args.repeats):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(copier.stream):
                torch.cuda._sleep(POSTING_CYCLES)  # type: ignore[no-untyped-call]
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
        source = Source("cuda_ipc", self._args.source_device)
        for span_bytes in (16 << 10, 8 << 20):
            with tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp") as folder:
                pair = Pair("cuda_ipc", source, span_bytes, self._args, Path(folder))
                try:
                    rows += self._measure_beside(step, pair, span_bytes)
                finally:
                    pair.close()
        source.close()
        return rows

    def _measure_beside(self, step: DecodeStep, pair: Pair, span_bytes: int) -> list[dict[str, Any]]:
        rows = []
        for load in ("link never idle", "14 hand-offs/s of 512 MiB"):
            alone_ms = step.mean_ms(DECODE_STEPS)
            feed = LinkFeed(pair, every=1 if load == "link never idle" else STEPS_PER_HANDOFF)
            beside_ms = step.mean_ms(DECODE_STEPS, feed.keep_going)
            seconds = feed.finish()
            again_ms = step.mean_ms(DECODE_STEPS)
            quiet_ms = min(alone_ms, again_ms)
            rows.append(
                {
                    "load": load, "span_bytes": span_bytes, "step_ms": quiet_ms,
                    "step_again_ms": max(alone_ms, again_ms), "beside_ms": beside_ms,
                    "slower": beside_ms / quiet_ms - 1,
                    "moved_gb_per_s": feed.num_read * self._size_bytes / seconds / 1e9,
                }
            )  # fmt: skip
        return rows


class LinkFeed:
    """Posts whole reads between decode steps: as many as keep the link busy, or one every so many steps."""

    def __init__(self, pair: Pair, every: int) -> None:
        self._pair = pair
        self._every = every
        self._read = pair.spans.read(pair.peer)
        self._steps = 0
        self._started_s = time.perf_counter()
        self._under_way: list[Transfer] = []
        self.num_read = 0
        # More than a step's worth of copying.
        self._target = 8 if every == 1 else 1

    def keep_going(self) -> None:
        self._under_way = [transfer for transfer in self._under_way if not transfer.poll().is_terminal]
        if self._steps % self._every == 0:
            while len(self._under_way) < self._target:
                self._under_way.append(self._pair.link.read(self._read))
                self.num_read += 1
        self._steps += 1

    def finish(self) -> float:
        """Seconds since the begin."""
        finish(self._under_way)
        return time.perf_counter() - self._started_s


def finish(transfers: list[Transfer]) -> None:
    wait(lambda: all(transfer.poll().is_terminal for transfer in transfers))
    for transfer in transfers:
        if transfer.poll() is not TransferState.DONE:
            raise transfer.error or TransferError("a read failed")


def wait(is_done: Callable[[], bool]) -> None:
    """Gives the processor away, but does not sleep: that would be part of what is measured."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not is_done():
        os.sched_yield()
        if time.monotonic() > give_up_s:
            raise TransferError(f"nothing came within {DEADLINE_S:g} s")


def void(_: object) -> None:
    pass


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"{settings['size_mib']} MiB in scattered spans, process to process; {source['devices']}; {source['cpu']}, "
        f"{source['cores']} cores; commit {source['commit']}\n"
    )
    rows, plain_gb_per_s = [], None
    for row in result["transfers"]:
        if row["way"] in PLAIN_COPIES:
            plain_gb_per_s = row["gb_per_s"]
        rows.append(transfer_cells(row, plain_gb_per_s))
    print_table(("span KiB", "way", "ms", "GB/s", "of the plain copy"), rows)
    if result["decode"]:
        print("\nDecode steps (batch 32, all weights and 4 GiB of KV read) beside reads of 512 MiB on the same GPU:\n")
        print_table(
            ("span KiB", "load", "step ms", "beside ms", "slower", "moved GB/s"), decode_cells(result["decode"])
        )


def transfer_cells(row: dict[str, Any], plain_gb_per_s: float | None) -> tuple[str, ...]:
    if "skipped" in row:
        return ("", row["way"], "", "", f"skipped: {row['skipped']}")
    share = f"{row['gb_per_s'] / plain_gb_per_s:.1%}" if plain_gb_per_s else ""
    return (f"{row['span_bytes'] >> 10}", row["way"], f"{row['ms']:.3f}", f"{row['gb_per_s']:.1f}", share)


def decode_cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['span_bytes'] >> 10}", row["load"], f"{row['step_ms']:.3f}", f"{row['beside_ms']:.3f}",
            f"{row['slower']:.1%}", f"{row['moved_gb_per_s']:.0f}",
        )
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
