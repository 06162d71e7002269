"""What images cost through encoder, prefill and decode, and what their caches save; see bench/README.md.

scripts/bench encoder                  one encoder, one prefill and one decode worker, a thread each, on two cores
scripts/bench encoder --rate 0.5 --requests 20

Beside it prefill that encodes images itself (`encode_in_prefill.py`), on the same cores, and for a single request
`transformers` with the whole model in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cluster import Cluster  # noqa: E402
from encode_in_prefill import MEDIA_FOLDER  # noqa: E402
from encoder_load import Cell, Load, ask, measure_cell  # noqa: E402
from encoder_questions import (  # noqa: E402
    IMAGE_SIDE,
    PATCHES_PER_IMAGE,
    TEXT_TOKENS,
    TOKENS_PER_IMAGE,
    Question,
    Questions,
    make_model,
)
from encoder_reference import Reference  # noqa: E402
from measured import OthersCpu, print_table, provenance, write_result  # noqa: E402
from msgspec import Struct, to_builtins  # noqa: E402

from kvrelay_client import AsyncClient  # noqa: E402

NUM_IMAGES = (0, 1, 4)
PROBES = 5  # of each kind of hit and miss
CHECK_TOKENS = 4
ENGINES: dict[str, str | None] = {"1E + 1P + 1D": None, "1P that encodes + 1D": "encode_in_prefill"}  # what is changed


class Side(Struct, frozen=True):
    ttft_ms: dict[str, float]  # of one request at a time, by what is known of it
    at_rate_ms: dict[str, Cell]  # by the number of images


class ChangedCluster(Cluster):
    """Its engines are changed by a module of this folder; see `changed_engines.py`."""

    def __init__(self, change: str | None, model_dir: Path, **flags: Any) -> None:
        super().__init__(model_dir, **flags)
        if change is not None:
            assert self._command[1:3] == ["-m", "kvrelay_cli"]
            self._command[1:3] = [str(ROOT / "bench" / "changed_engines.py"), change]


def main() -> int:
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # of all that is started from here too
    others = OthersCpu()
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        model_dir = make_model(Path(folder) / "model")
        os.environ[MEDIA_FOLDER] = folder
        reference = Reference(model_dir)
        reference.use_threads(1)
        check = Questions(0).new(2)
        expected = reference.ask(check, CHECK_TOKENS)[0]
        sides = {name: measure_relay(args, name, model_dir, check, expected) for name in ENGINES}
        alone_ms = {f"{count} threads": measure_reference(reference, count) for count in sorted({1, args.cores})}
    result = {
        "provenance": provenance(),
        "cores_used_by_others": round(others.cores(), 2),
        "settings": {name: getattr(args, name) for name in ("cores", "rate", "requests", "max_tokens", "streams")},
        "ttft_ms": {name: side.ttft_ms for name, side in sides.items()},
        "transformers_ttft_ms": alone_ms,
        "at_rate_ms": {name: to_builtins(side.at_rate_ms) for name, side in sides.items()},
    }
    print_result(result)
    print(f"\nwritten to {write_result('encoder', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="that everything runs on, also transformers")
    parser.add_argument("--rate", type=float, default=0.8, help="requests a second with images, and without any")
    parser.add_argument("--requests", type=int, default=20, help="for each number of images")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--streams", type=int, default=2, help="of text that run beside all requests")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- the relay


def measure_relay(args: argparse.Namespace, name: str, model_dir: Path, check: Question, expected: list[int]) -> Side:
    flags: dict[str, Any] = {"threads_per_worker": 1, "kv_blocks": 256, "max_num_seqs": 16, "log_level": "warning"}
    with ChangedCluster(ENGINES[name], model_dir, encoder=1, **flags) as cluster:
        side = asyncio.run(_measure_relay(args, cluster, check, expected))
        cluster.assert_no_leaks()
    return side


async def _measure_relay(args: argparse.Namespace, cluster: Cluster, check: Question, expected: list[int]) -> Side:
    load = Load(args.rate, args.requests, args.max_tokens, args.streams)
    async with cluster.client() as client:
        if (await ask(client, check, CHECK_TOKENS))[0] != expected:
            raise SystemExit("the relay and transformers answer differently; nothing was measured")
        ttft_ms = await probe_caches(client)
        questions = Questions(2)
        return Side(ttft_ms, {str(count): await measure_cell(client, questions, count, load) for count in NUM_IMAGES})


async def probe_caches(client: AsyncClient) -> dict[str, float]:
    """TTFT of one request at a time with one image, by what is known of it."""
    questions = Questions(1)
    pictures = [questions.picture() for _ in range(PROBES)]
    new = [questions.with_pictures([picture]) for picture in pictures]
    other_text = [questions.with_pictures([picture]) for picture in pictures]
    no_image = [Question(questions.text(TEXT_TOKENS + TOKENS_PER_IMAGE + 2), []) for _ in range(PROBES)]
    return {
        "new image, new text": await median_ttft_ms(client, new),
        "known image, new text": await median_ttft_ms(client, other_text),
        "known image, known text (KV prefix)": await median_ttft_ms(client, new),
        "no image, as many tokens": await median_ttft_ms(client, no_image),
    }


async def median_ttft_ms(client: AsyncClient, questions: Sequence[Question]) -> float:
    return 1e3 * statistics.median([(await ask(client, question, 2))[1].ttft_s for question in questions])


# ------------------------------------------------------------------------------------------------------- transformers


def measure_reference(reference: Reference, num_threads: int) -> float:
    """TTFT of one new image with new text, in milliseconds."""
    reference.use_threads(num_threads)
    probes = Questions(1)
    asked = [probes.with_pictures([probes.picture()]) for _ in range(PROBES)]
    return 1e3 * statistics.median([reference.ask(question, 2)[1].ttft_s for question in asked])


# ------------------------------------------------------------------------------------------------------- the table


def print_result(result: dict[str, Any]) -> None:
    source, settings = result["provenance"], result["settings"]
    print(
        f"Qwen2.5-VL with 8 x 512 of text and 8 x 320 of tower, float32; an image has {IMAGE_SIDE} x {IMAGE_SIDE} "
        f"pixels, {PATCHES_PER_IMAGE} patches, {TOKENS_PER_IMAGE} tokens; {TEXT_TOKENS} tokens of text; "
        f"{source['cpu']}, {source['cores']} cores; commit {source['commit']}; others used "
        f"{result['cores_used_by_others']:.2f} cores meanwhile\n"
    )
    ttft_rows = [
        (system, what, f"{value:.0f}") for system, cells in result["ttft_ms"].items() for what, value in cells.items()
    ]
    ttft_rows += [
        ("transformers", f"new image, new text, {threads}", f"{value:.0f}")
        for threads, value in result["transformers_ttft_ms"].items()
    ]
    print_table(("", "one request at a time", "TTFT ms"), ttft_rows)
    print(
        f"\n{settings['rate']:g} requests/s with images and as many without, {settings['requests']} of each, "
        f"{settings['max_tokens']} tokens out, beside {settings['streams']} streams of text\n"
    )
    print_cells(result["at_rate_ms"])


def print_cells(cells: dict[str, dict[str, dict[str, float]]]) -> None:
    header = ("", "images", "TTFT p50 ms", "p99", "of text p50", "p99", "inter-token p50 ms", "p99")
    rows = [
        (system, images, *(f"{value:.1f}" for value in row.values()))
        for system, by_images in cells.items()
        for images, row in by_images.items()
    ]
    print_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
