"""KVRelay's side of the comparison: a cluster of processes, asked through its router or a decode worker directly."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import grpc
from cluster import Cluster
from measured import Stream, Streams
from msgspec import Struct
from processes import cpu_seconds, descendants

from kvrelay.v1 import common_pb2, decode_pb2
from kvrelay.v1.decode_pb2_grpc import DecodeServiceStub
from kvrelay_client import AsyncClient, Finish
from kvrelay_core.request import HandoffTiming

IDLE_WINDOW_S = 5.0


class Asked(Struct, frozen=True):
    token_ids: tuple[int, ...]
    stream: Stream
    handoff: HandoffTiming


async def ask(client: AsyncClient, prompt: Sequence[int], num_tokens: int) -> Asked:
    started_s = time.perf_counter()
    token_ids: list[int] = []
    arrivals_s: list[float] = []
    async for event in client.generate(token_ids=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True):
        if isinstance(event, Finish):
            assert event.timing.handoff is not None, "no KV was handed off"
            handoff = event.timing.handoff
            continue
        token_ids += event.token_ids
        arrivals_s += [time.perf_counter() - started_s] * len(event.token_ids)
    return Asked(tuple(token_ids), Stream(tuple(arrivals_s)), handoff)


async def one_after_another(cluster: Cluster, prompts: list[list[int]], num_tokens: int) -> Streams:
    async with cluster.client() as client:
        started_s = time.perf_counter()
        streams = [(await ask(client, prompt, num_tokens)).stream for prompt in prompts]
        return Streams(tuple(streams), time.perf_counter() - started_s)


async def all_at_once(cluster: Cluster, prompts: list[list[int]], num_tokens: int) -> Streams:
    async with cluster.client() as client:
        started_s = time.perf_counter()
        asked = await asyncio.gather(*(ask(client, prompt, num_tokens) for prompt in prompts))
        return Streams(tuple(one.stream for one in asked), time.perf_counter() - started_s)


def decode_alone(cluster: Cluster, prompts: list[list[int]], num_tokens: int) -> Streams:
    """One decode worker does both phases, asked directly: no router, no prefill worker, no hand-off."""
    with grpc.insecure_channel(cluster.address_of("decode", 0)) as channel:
        stub = DecodeServiceStub(channel)
        started_s = time.perf_counter()
        streams = tuple(_decode_one(stub, prompt, num_tokens) for prompt in prompts)
        return Streams(streams, time.perf_counter() - started_s)


def _decode_one(stub: DecodeServiceStub, prompt: list[int], num_tokens: int) -> Stream:
    attempt = common_pb2.AttemptId(router_id="bench", request_id=os.urandom(8).hex(), attempt=1)
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    generation = common_pb2.Generation(prompt_token_ids=prompt, sampling=sampling, seed=1)
    generation.choices.add(index=0)
    start = decode_pb2.DecodeStart(attempt=attempt, generation=generation)
    started_s = time.perf_counter()
    arrivals_s: list[float] = []
    for response in stub.Decode(iter([decode_pb2.DecodeRequest(start=start)]), timeout=300):
        arrivals_s += [time.perf_counter() - started_s] * len(response.tokens.token_ids)
    assert len(arrivals_s) == num_tokens, f"{len(arrivals_s)} of {num_tokens} tokens came"
    return Stream(tuple(arrivals_s))


async def handoff_rates(cluster: Cluster, prompts: list[list[int]]) -> list[float]:
    """GB/s of one hand-off per prompt. Each prompt is asked twice, and round robin sends it to the other decode worker
    the second time: prefill then has it in its cache, and the hand-off waits for nothing but the link."""
    rates = []
    async with cluster.client() as client:
        for prompt in prompts:
            await ask(client, prompt, 2)
            handoff = (await ask(client, prompt, 2)).handoff
            assert handoff.blocks_reused == 0, "the second ask went to the same decode worker"
            rates.append(handoff.size_bytes / handoff.seconds / 1e9)
    return rates


def idle_shares(cluster: Cluster) -> dict[str, float]:
    """Share of one core that each process of the idle cluster uses."""
    pids = [cluster.up_pid, *descendants(cluster.up_pid)]
    before = {pid: cpu_seconds(pid) for pid in pids}
    time.sleep(IDLE_WINDOW_S)  # what is measured
    used = {pid: (cpu_seconds(pid) - before[pid]) / IDLE_WINDOW_S for pid in pids}
    names = {
        "router": cluster.pid_of("router"),
        "prefill service": cluster.pid_of("prefill"),
        "prefill engine": cluster.engine_pid_of("prefill"),
        "decode service": cluster.pid_of("decode"),
        "decode engine": cluster.engine_pid_of("decode"),
        "supervisor": cluster.up_pid,
    }
    return {name: used[pid] for name, pid in names.items()}
