"""What images cost through encoder, prefill and decode, and what their caches save, on CPU; see bench/README.md.

scripts/bench encoder                  one encoder, one prefill and one decode worker, a thread each, on two cores
scripts/bench encoder --rate 0.5 --requests 20

Encoding in prefill, which this relay does not do, is stood for by `transformers`: the whole model in one process, with
one thread and with one for each core, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cluster import Cluster  # noqa: E402
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
from measured import OthersCpu, Stream, print_table, provenance, write_result  # noqa: E402
from msgspec import Struct  # noqa: E402

from kvrelay_client import AsyncClient  # noqa: E402

NUM_IMAGES = (0, 1, 4)
PROBES = 5  # of each kind of hit and miss
CHECK_TOKENS = 4


class Side(Struct, frozen=True):
    ttft_ms: dict[str, float]  # of one request at a time, by what is known of it
    at_rate_ms: dict[str, dict[str, float]]  # by the number of images


def main() -> int:
    args = parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # of all that is started from here too
    others = OthersCpu()
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        model_dir = make_model(Path(folder) / "model")
        reference = Reference(model_dir)
        reference.use_threads(1)
        check = Questions(0).new(2)
        expected = reference.ask(check, CHECK_TOKENS)[0]
        with Cluster(
            model_dir, encoder=1, threads_per_worker=1, kv_blocks=160, max_num_seqs=16, log_level="warning"
        ) as cluster:
            relay = asyncio.run(measure_relay(args, cluster, check, expected))
            cluster.assert_no_leaks()
        sides = {"kvrelay, 1E+1P+1D": relay}
        for num_threads in sorted({1, args.cores}):
            reference.use_threads(num_threads)
            sides[f"transformers, {num_threads} threads"] = measure_reference(args, reference)
    result = {
        "provenance": provenance(),
        "cores_used_by_others": round(others.cores(), 2),
        "settings": {name: getattr(args, name) for name in ("cores", "rate", "requests", "max_tokens")},
        "ttft_ms": {name: side.ttft_ms for name, side in sides.items()},
        "at_rate_ms": {name: side.at_rate_ms for name, side in sides.items()},
    }
    print_result(result)
    print(f"\nwritten to {write_result('encoder', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="that everything runs on, also transformers")
    parser.add_argument("--rate", type=float, default=0.8, help="requests a second, evenly spaced")
    parser.add_argument("--requests", type=int, default=8, help="for each number of images")
    parser.add_argument("--max-tokens", type=int, default=16)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- the relay


async def measure_relay(args: argparse.Namespace, cluster: Cluster, check: Question, expected: list[int]) -> Side:
    async with cluster.client() as client:
        if (await ask(client, check, CHECK_TOKENS))[0] != expected:
            raise SystemExit("kvrelay and transformers answer differently; nothing was measured")
        ttft_ms = await probe_caches(client)
        questions = Questions(2)
        at_rate: dict[str, dict[str, float]] = {}
        for num_images in NUM_IMAGES:
            asked = [questions.new(num_images) for _ in range(args.requests)]
            at_rate[str(num_images)] = summary_of(await ask_at_rate(client, asked, args))
    return Side(ttft_ms, at_rate)


async def ask(client: AsyncClient, question: Question, num_tokens: int) -> tuple[list[int], Stream]:
    started_s = time.perf_counter()
    token_ids: list[int] = []
    arrivals_s: list[float] = []
    async for event in client.generate(
        token_ids=question.token_ids, media=question.pictures, max_tokens=num_tokens, temperature=0, ignore_eos=True
    ):
        new = getattr(event, "token_ids", ())
        token_ids += new
        arrivals_s += [time.perf_counter() - started_s] * len(new)
    return token_ids, Stream(tuple(arrivals_s))


async def probe_caches(client: AsyncClient) -> dict[str, float]:
    """TTFT of one request at a time with one image, by what is known of it."""
    questions = Questions(1)
    pictures = [questions.picture() for _ in range(PROBES)]
    new = [questions.with_pictures([picture]) for picture in pictures]
    other_text = [questions.with_pictures([picture]) for picture in pictures]
    no_image = [Question(questions.text(TEXT_TOKENS + TOKENS_PER_IMAGE + 2), []) for _ in range(PROBES)]
    return {
        "new image, new text": await median_ttft_ms(client, new),
        "known image, new text (encoder's cache)": await median_ttft_ms(client, other_text),
        "known image, known text (KV prefix)": await median_ttft_ms(client, new),
        "no image, as many tokens": await median_ttft_ms(client, no_image),
    }


async def median_ttft_ms(client: AsyncClient, questions: Sequence[Question]) -> float:
    return 1e3 * statistics.median([(await ask(client, question, 2))[1].ttft_s for question in questions])


async def ask_at_rate(client: AsyncClient, questions: Sequence[Question], args: argparse.Namespace) -> list[Stream]:
    async def ask_after(delay_s: float, question: Question) -> Stream:
        await asyncio.sleep(delay_s)  # until it comes
        return (await ask(client, question, args.max_tokens))[1]

    return await asyncio.gather(*(ask_after(index / args.rate, question) for index, question in enumerate(questions)))


# ------------------------------------------------------------------------------------------------------- transformers


def measure_reference(args: argparse.Namespace, reference: Reference) -> Side:
    """On the questions that the relay was asked."""
    probes = Questions(1)
    pictures = [probes.picture() for _ in range(PROBES)]
    ttfts_s = [reference.ask(probes.with_pictures([picture]), 2)[1].ttft_s for picture in pictures]
    questions = Questions(2)
    at_rate: dict[str, dict[str, float]] = {}
    for num_images in NUM_IMAGES:
        asked = [questions.new(num_images) for _ in range(args.requests)]
        at_rate[str(num_images)] = summary_of(reference.at_rate(asked, 1 / args.rate, args.max_tokens))
    return Side({"new image, new text": 1e3 * statistics.median(ttfts_s)}, at_rate)


# ------------------------------------------------------------------------------------------------------- the table


def summary_of(streams: Sequence[Stream]) -> dict[str, float]:
    """In milliseconds. Gaps are those between any two tokens of a stream that follow each other."""
    ttfts = sorted(stream.ttft_s for stream in streams)
    gaps = sorted(
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.arrivals_s, stream.arrivals_s[1:], strict=False)
    )
    return {
        "ttft_p50": 1e3 * statistics.median(ttfts),
        "ttft_max": 1e3 * ttfts[-1],
        "inter_token_p50": 1e3 * statistics.median(gaps),
        "inter_token_p99": 1e3 * gaps[min(len(gaps) - 1, round(0.99 * len(gaps)))],
    }


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
    print_table(("", "one request at a time", "TTFT ms"), ttft_rows)
    print(f"\n{settings['rate']:g} requests/s, {settings['requests']} of each, {settings['max_tokens']} tokens out\n")
    rows = [
        (system, images, *(f"{value:.0f}" for value in row.values()))
        for system, cells in result["at_rate_ms"].items()
        for images, row in cells.items()
    ]
    print_table(("", "images", "TTFT p50 ms", "max", "inter-token p50 ms", "p99"), rows)


if __name__ == "__main__":
    sys.exit(main())
