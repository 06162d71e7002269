"""Requests at a fixed rate beside text streams that run all the while, and what either notices of the other."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from encoder_questions import Question, Questions
from measured import Stream
from msgspec import Struct

from kvrelay_client import AsyncClient

STREAM_TOKENS = 512  # of a stream that runs beside; then another one begins
SETTLE_S = 1.0  # streams have begun, and the last cell's requests are gone


class Load(Struct, frozen=True):
    rate: float  # requests a second of either kind, evenly spaced
    requests: int
    max_tokens: int
    streams: int  # that run beside them


class Cell(Struct, frozen=True):
    """In milliseconds; `text` are the requests without images that come between the others, `gap` the time between two
    tokens of a stream that runs beside them all."""

    ttft_p50: float
    ttft_p99: float
    text_ttft_p50: float
    text_ttft_p99: float
    gap_p50: float
    gap_p99: float


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


async def measure_cell(client: AsyncClient, questions: Questions, num_images: int, load: Load) -> Cell:
    """`load.requests` requests with that many new images each, and as many without any in between."""
    gaps_s: list[float] = []
    asked = [questions.new(num_images) for _ in range(load.requests)]
    texts = [questions.new(0) for _ in range(load.requests)]
    async with asyncio.TaskGroup() as group:
        beside = [group.create_task(_stream_on(client, questions.new(0), gaps_s)) for _ in range(load.streams)]
        await asyncio.sleep(SETTLE_S)  # not measured
        gaps_s.clear()
        ttfts_s, text_ttfts_s = await asyncio.gather(
            _ask_at_rate(client, asked, load, first_s=0.0),
            _ask_at_rate(client, texts, load, first_s=0.5 / load.rate),
        )
        sides = (ttfts_s, text_ttfts_s, gaps_s.copy())
        for task in beside:
            task.cancel()
    return Cell(*(1e3 * value for side in sides for value in (statistics.median(side), percentile(side, 0.99))))


async def _ask_at_rate(client: AsyncClient, questions: Sequence[Question], load: Load, first_s: float) -> list[float]:
    async def ttft_s(index: int, question: Question) -> float:
        await asyncio.sleep(first_s + index / load.rate)  # until it comes
        return (await ask(client, question, load.max_tokens))[1].ttft_s

    return await asyncio.gather(*(ttft_s(index, question) for index, question in enumerate(questions)))


async def _stream_on(client: AsyncClient, question: Question, gaps_s: list[float]) -> None:
    """One answer after another; the gap in which decode takes a stream over from prefill is not one of decode's."""
    while True:
        arrivals_s: list[float] = []
        async for event in client.generate(
            token_ids=question.token_ids, max_tokens=STREAM_TOKENS, temperature=0, ignore_eos=True
        ):
            if getattr(event, "token_ids", ()):
                arrivals_s.append(time.perf_counter())
                if len(arrivals_s) > 2:
                    gaps_s.append(arrivals_s[-1] - arrivals_s[-2])


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * len(ordered)))]
