"""Cancelling at any stage frees everything: blocks, pins, leases, transfers, streams, tasks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys

import pytest
from answers import ask_greedy
from cluster import Cluster, wait_until
from oracle import make_prompt

from kvrelay_client import AsyncClient, Delta
from kvrelay_core.errors import DeadlineError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

VOCAB_SIZE = 384
KILLED_PEER_DEADLINE_S = 5.0


async def cancel_after(client: AsyncClient, num_tokens: int | None, delay_s: float, prompt: list[int]) -> None:
    """Leaves the stream after that many tokens, or after a delay whatever came."""
    async with client.generate(token_ids=prompt, temperature=0, max_tokens=400, ignore_eos=True) as stream:
        if num_tokens is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    async for _ in stream:
                        pass
            return
        seen = 0
        async for event in stream:
            seen += len(event.token_ids) if isinstance(event, Delta) else 0
            if seen >= num_tokens:
                return


async def test_the_books_show_what_is_held_meanwhile(cluster: Cluster) -> None:
    """Else the other tests here would prove nothing."""
    prompt = make_prompt(VOCAB_SIZE, 600, 1)
    async with cluster.client() as client:
        async with client.generate(token_ids=prompt, temperature=0, max_tokens=3000, ignore_eos=True) as stream:
            async for _ in stream:
                break
            held = await asyncio.to_thread(cluster.held)
        assert {"decode-0: 1 requests_running", "decode-0: 1 tasks"} & set(held)
        assert any("blocks_in_use" in line for line in held)
        await asyncio.to_thread(cluster.assert_no_leaks)


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
async def test_before_the_first_token(cluster: Cluster, delay_s: float) -> None:
    """3000 tokens in chunks of 64: queued, accepted, in prefill, in hand-off."""
    async with cluster.client() as client:
        await cancel_after(client, None, delay_s, make_prompt(VOCAB_SIZE, 3000, int(delay_s * 1000)))
        await asyncio.to_thread(cluster.assert_no_leaks)


async def test_in_the_handoff_itself(cluster: Cluster) -> None:
    """Decode's engine stands still, shorter than a lease lasts: no hand-off ends before the cancel is there."""
    engine = cluster.engine_pid_of("decode")
    pulled_bytes = cluster.load_of("decode").handoff_bytes
    async with cluster.client() as client:
        os.kill(engine, signal.SIGSTOP)
        try:
            prompt = make_prompt(VOCAB_SIZE, 300, 77)
            async with client.generate(token_ids=prompt, temperature=0, max_tokens=400, ignore_eos=True) as stream:
                await anext(stream)
                held = await asyncio.to_thread(cluster.load_of, "prefill")
            # The cancel has to be there first: prefill hears of it after decode, whose service has read it by now.
            await asyncio.to_thread(
                wait_until, lambda: not cluster.load_of("prefill").leases, 2, "the cancel reached prefill"
            )
            await asyncio.to_thread(cluster.describe, "decode")
        finally:
            os.kill(engine, signal.SIGCONT)
        # Prefill had finished, its ticket waited for a reader, and the reader had read nothing.
        assert held.requests_running == held.requests_waiting == 0
        assert held.leases == 1 and held.blocks_pinned > 0
        await asyncio.to_thread(cluster.assert_no_leaks)
        assert cluster.load_of("decode").handoff_bytes == pulled_bytes


@pytest.mark.parametrize("num_tokens", [1, 2, 30])
async def test_while_tokens_come(cluster: Cluster, num_tokens: int) -> None:
    """After the first token the hand-off may still run; later decode does."""
    async with cluster.client() as client:
        await cancel_after(client, num_tokens, 0, make_prompt(VOCAB_SIZE, 700, num_tokens))
        await asyncio.to_thread(cluster.assert_no_leaks)


async def test_a_queued_request(cluster: Cluster) -> None:
    """Behind 40 long prompts it cannot have started."""
    async with cluster.client() as client:
        async with asyncio.TaskGroup() as running:
            crowd = [
                running.create_task(cancel_after(client, 1, 0, make_prompt(VOCAB_SIZE, 500, 100 + index)))
                for index in range(40)
            ]
            await cancel_after(client, None, 0.05, make_prompt(VOCAB_SIZE, 500, 99))
            assert not all(task.done() for task in crowd)
        await asyncio.to_thread(cluster.assert_no_leaks)


async def test_a_deadline_ends_the_request(cluster: Cluster) -> None:
    async with cluster.client() as client:
        with pytest.raises(DeadlineError):
            async for _ in client.generate(
                token_ids=make_prompt(VOCAB_SIZE, 900, 1), max_tokens=3000, ignore_eos=True, timeout_s=0.3
            ):
                pass
        await asyncio.to_thread(cluster.assert_no_leaks)


async def test_500_random_cancels_leave_the_counts_at_zero(cluster: Cluster) -> None:
    """Eight at a time, with what a survivor is answered as the proof that nobody else was harmed."""
    generator = random.Random(1)
    slots = asyncio.Semaphore(8)
    prompt = make_prompt(VOCAB_SIZE, 100, 1)

    async def one(client: AsyncClient, index: int) -> None:
        async with slots:
            num_tokens = generator.choice([None, None, 1, 2, 5, 20])
            length = generator.choice([1, 10, 64, 65, 300, 900])
            await cancel_after(client, num_tokens, generator.uniform(0, 0.08), make_prompt(VOCAB_SIZE, length, index))

    async with cluster.client() as client:
        undisturbed = await ask_greedy(client, prompt, 30)
        async with asyncio.TaskGroup() as all_of_them:
            for index in range(500):
                all_of_them.create_task(one(client, index))
            survivor = all_of_them.create_task(ask_greedy(client, prompt, 30))
        assert survivor.result() == undisturbed
        await asyncio.to_thread(cluster.assert_no_leaks)
        assert await ask_greedy(client, prompt, 30) == undisturbed


CLIENT = """
import sys
from kvrelay_client import Client
with Client(sys.argv[1]) as client:
    for event in client.generate(token_ids=list(range(1, 300)), max_tokens=3000, temperature=0, ignore_eos=True):
        print("token", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_client_process(cluster: Cluster, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", CLIENT, cluster.target], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"token\n"
        client.send_signal(number)
    cluster.assert_no_leaks(KILLED_PEER_DEADLINE_S)
