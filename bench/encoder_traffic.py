"""What images do to everybody else on two GPUs, and what their hand-off takes; see bench/README.md.

scripts/bench encoder_traffic                    pictures of 1,008 x 1,008 pixels
scripts/bench encoder_traffic --side 448 --rate 8

Prefill has the first GPU, decode the second. The encoder is beside decode, or beside prefill, or there is none and
prefill computes the tower (`encode_in_prefill.py`). The tower is Qwen2.5-VL-7B's, the text model has its width and 4 of
its layers; random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from encode_in_prefill import MEDIA_FOLDER  # noqa: E402
from encoder import ChangedCluster, print_cells  # noqa: E402
from encoder_checkpoint import make_wide_model  # noqa: E402
from encoder_load import Cell, Load, ask, measure_cell, percentile  # noqa: E402
from encoder_questions import Questions  # noqa: E402
from handoff_clock import STAGES, read_stages  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402
from msgspec import to_builtins  # noqa: E402

NUM_IMAGES = (0, 1, 4)
WARM_UPS = 2
ARRANGEMENTS: dict[str, tuple[str, int]] = {  # what is changed in the engines, and the encoder's GPU
    "encoder beside prefill": ("handoff_clock", 0),
    "prefill encodes": ("encode_in_prefill", 0),
    "encoder beside decode": ("handoff_clock", 1),
}


def main() -> int:
    args = parse_args()
    if torch.cuda.device_count() < 2:
        print("bench/encoder_traffic.py needs two NVIDIA GPUs; nothing was measured", file=sys.stderr)
        return 1
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-", dir=args.folder) as folder, ExitStack() as stack:
        model_dir = make_wide_model(Path(folder) / "model", args.side, torch.device("cuda"))
        torch.cuda.empty_cache()
        os.environ[MEDIA_FOLDER] = folder
        clusters = start(args.arrangements, model_dir, stack)
        result = measure_clusters(args, clusters, began_s + args.time_s)
        print_result(result)
        print(f"\nwritten to {write_result('encoder_traffic', result).relative_to(ROOT)}", flush=True)
        for cluster in clusters.values():
            cluster.assert_no_leaks()
    return 0


def measure_clusters(args: argparse.Namespace, clusters: dict[str, ChangedCluster], until_s: float) -> dict[str, Any]:
    load = Load(args.rate, args.requests, args.max_tokens, args.streams)
    cells: dict[str, dict[str, Cell]] = {}
    for name, cluster in clusters.items():
        if time.monotonic() >= until_s:
            print(f"{name} was left out: {args.time_s:g} s are over", file=sys.stderr)
            continue
        cells[name] = asyncio.run(measure(cluster, load, args.side))
        print(f"{name}: {to_builtins(cells[name])}", file=sys.stderr, flush=True)
    stages = {name: summary_of(read_stages(clusters[name].folder)) for name in cells}
    return {
        "provenance": {**provenance(), "gpus": f"2 {torch.cuda.get_device_name()}"},
        "settings": {name: getattr(args, name) for name in ("side", "rate", "requests", "max_tokens", "streams")},
        "at_rate_ms": {name: to_builtins(by_images) for name, by_images in cells.items()},
        "handoff_ms": {name: stage for name, stage in stages.items() if stage},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1008, help="of a picture in pixels, a multiple of 28")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second with images, and without any")
    parser.add_argument("--requests", type=int, default=30, help="for each number of images")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--streams", type=int, default=4, help="of text that run beside all requests")
    parser.add_argument("--time-s", type=float, default=600.0, help="after which no other arrangement is begun")
    parser.add_argument("--folder", default="/tmp", help="where the checkpoint goes")
    parser.add_argument(
        "--arrangements", type=lambda text: text.split(","), default=list(ARRANGEMENTS), help="some of them, by commas"
    )
    return parser.parse_args()


def start(names: list[str], model_dir: Path, stack: ExitStack) -> dict[str, ChangedCluster]:
    """All at once, since loading takes longer than measuring; those that nobody asks do nothing."""
    clusters = {name: make_cluster(*ARRANGEMENTS[name], model_dir) for name in names}
    with ThreadPoolExecutor(len(names)) as starters:
        for started in [starters.submit(stack.enter_context, cluster) for cluster in clusters.values()]:
            started.result()
    return clusters


def make_cluster(change: str, encoder_device: int, model_dir: Path) -> ChangedCluster:
    return ChangedCluster(
        change, model_dir, encoder=1, device="cuda", prefill_devices=0, decode_devices=1,
        encoder_devices=encoder_device, kv_blocks=1024, max_num_seqs=32, embedding_mib=1024, log_level="warning",
    )  # fmt: skip


async def measure(cluster: ChangedCluster, load: Load, side: int) -> dict[str, Cell]:
    async with cluster.client() as client:
        warm_up = Questions(1, side, "JPEG")
        for num_images in NUM_IMAGES * WARM_UPS:
            await ask(client, warm_up.new(num_images), load.max_tokens)
        questions = Questions(2, side, "JPEG")
        return {str(count): await measure_cell(client, questions, count, load) for count in NUM_IMAGES}


# ---------------------------------------------------------------------------------------------------- the hand-off


def summary_of(items: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds of each stage since the one before, of the middle item; and all of them together."""
    if not items:
        return {}
    first, *rest = STAGES
    medians = {}
    for before, stage in zip(STAGES, rest, strict=False):
        medians[stage] = 1e3 * statistics.median(item[stage] - item[before] for item in items.values())
    whole_s = [item[STAGES[-1]] - item[first] for item in items.values()]
    return {
        **medians, "all": 1e3 * statistics.median(whole_s), "all_p99": 1e3 * percentile(whole_s, 0.99),
        "items": len(items),
    }  # fmt: skip


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"pictures of {settings['side']} x {settings['side']} pixels; {settings['rate']:g} requests/s with images and "
        f"as many without, {settings['requests']} of each, beside {settings['streams']} streams of text; "
        f"{source['gpus']}; commit {source['commit']}\n"
    )
    print_cells(result["at_rate_ms"])
    print("\nfrom an embedding's end on the encoder's GPU to its use by prefill, ms since the stage before\n")
    header = ("", *STAGES[1:], "all", "all p99", "items")
    print_table(
        header, [(name, *(f"{value:.2f}" for value in row.values())) for name, row in result["handoff_ms"].items()]
    )


if __name__ == "__main__":
    sys.exit(main())
