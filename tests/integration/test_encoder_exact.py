"""Answers about pictures stay those of `transformers` when what was computed for them is lost, or is elsewhere.

An encoder that was killed, or ended and started again, in between; the next turn of a conversation at another prefill
worker; and decode workers that run out of room.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any

import pytest
from answers import Answer
from cluster import Cluster
from lone_worker import serve
from PIL import Image
from vision_cases import VisionCases, ask_about
from vision_checkpoints import as_bytes
from vision_questions import QuestionMaker, usable_prefix

from kvrelay_cli.ports import choose_ports
from kvrelay_client import AsyncClient
from kvrelay_core.errors import UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ONE_OF_EACH = ["qwen2_5_vl", pytest.param("gemma3_crops", marks=pytest.mark.full)]
HIT_TOKENS = 64
WAITED_FOR_S = 5.0  # an encoder, when none serves


@pytest.mark.parametrize("model", ONE_OF_EACH)
async def test_encoder_exact_after_an_encoder_was_killed(vision_cases: VisionCases, model: str) -> None:
    """`kvrelay up` starts it again; meanwhile requests wait for it."""
    case = vision_cases(model)
    first, second = case.maker.chat("one", (9, "A", 12)), case.maker.chat("two", (4, "A", 15, "C", 3))
    with Cluster(case.model_dir, encoder=1, block_tokens=16, max_num_seqs=8) as cluster:
        async with cluster.client() as client:
            assert (await ask_about(client, **first.ways()[0])).token_ids == first.answer
            cluster.wait_restarted("encoder", 0, cluster.kill("encoder"))
            assert (await ask_about(client, **second.ways()[0])).token_ids == second.answer
            assert (await ask_about(client, **first.ways()[0])).token_ids == first.answer
        cluster.assert_no_leaks()


@pytest.mark.full
async def test_encoder_exact_while_the_only_encoder_is_killed(vision_cases: VisionCases) -> None:
    """In the middle of pictures that take seconds to decode: they are encoded once the supervisor has it up again, or
    the request ends typed where that takes too long."""
    case = vision_cases("qwen2_5_vl")
    shades = [Image.linear_gradient("L").rotate(90 * turn).resize((6000, 6000)).convert("RGB") for turn in range(4)]
    pictures = [as_bytes(shade, "JPEG") for shade in shades]
    prompt = [token for index in range(4) for token in (5 + index, case.reference.pad, 9)]
    with Cluster(case.model_dir, encoder=1, block_tokens=16, max_num_seqs=8, max_model_len=1024) as cluster:
        async with cluster.client() as client:
            # What follows an image's end changes its name, and nothing else.
            twins = [picture + b"twin" for picture in pictures]
            expected = (await ask_about(client, token_ids=prompt, media=twins)).token_ids
            asking = asyncio.ensure_future(ask_about(client, token_ids=prompt, media=pictures, cache_salt="other"))
            while not await asyncio.to_thread(lambda: cluster.load_of("encoder").requests_waiting):
                assert not asking.done(), "they were encoded before anybody looked"
            killed_s = time.monotonic()
            old_pid = cluster.kill("encoder")
            await asyncio.to_thread(cluster.wait_restarted, "encoder", 0, old_pid)
            is_late = time.monotonic() - killed_s > WAITED_FOR_S
            [outcome] = await asyncio.gather(asking, return_exceptions=True)
            if is_late and isinstance(outcome, UnavailableError):
                assert "no encoder serves" in outcome.message
            else:
                assert isinstance(outcome, Answer) and outcome.token_ids == expected, repr(outcome)
        cluster.assert_no_leaks()


@pytest.mark.full
@pytest.mark.parametrize("model", ["qwen2_5_vl", "gemma3_crops"])
async def test_encoder_exact_after_an_encoder_has_restarted(vision_cases: VisionCases, model: str) -> None:
    """Tickets and links are of one start: those of the old one are not used, nor missed."""
    case = vision_cases(model)
    first, second = case.maker.chat("one", (9, "A", 12)), case.maker.chat("two", (4, "A", 15, "C", 3))
    (port,) = choose_ports("127.0.0.1", 1)
    encoder = {"model": case.model_dir, "grpc_port": port}
    text = {"model": case.model_dir, "block_tokens": 16, "max_num_seqs": 8}
    with ExitStack() as started:
        peers = started.enter_context(serve("encoder", **encoder))
        with (
            serve("prefill", peers=peers, **text) as prefill,
            serve("decode", peers=prefill, **text) as decode,
            serve("router", model=case.model_dir, encoder=peers, prefill=prefill, decode=decode) as target,
        ):
            async with AsyncClient(target) as client:
                assert (await ask_about(client, **first.ways()[0])).token_ids == first.answer
                started.pop_all().close()
                started.enter_context(serve("encoder", **encoder))
                assert (await ask_about(client, **second.ways()[0])).token_ids == second.answer
                assert (await ask_about(client, **first.ways()[0])).token_ids == first.answer
                assert (await ask_about(client, **first.other())).token_ids == first.other_answer


@pytest.mark.full
@pytest.mark.parametrize("model", ["qwen2_5_vl", "gemma3"])
async def test_encoder_exact_next_turn_at_another_worker(vision_cases: VisionCases, model: str) -> None:
    """It takes the last turn back from decode; a unit that ends inside a picture is of no use to Gemma."""
    case = vision_cases(model)
    first = case.maker.bare("first turn", (60, "B", 70))
    turn = case.maker.bare("second turn", (50, "B", 9), after=first)
    flags: dict[str, Any] = {
        "placement": "round_robin",
        "block_tokens": 16,
        "max_batched_tokens": 24,
        "max_num_seqs": 8,
    }
    with Cluster(case.model_dir, prefill=2, encoder=1, prefix_wait=10, **flags) as cluster:
        async with cluster.client() as client:
            workers: set[str] = set()
            while len(workers) < 2:  # a cluster is ready with the first of each role
                answer = await ask_about(client, token_ids=[len(workers) + 1, 2, 3], max_tokens=2)
                workers.add(answer.end.timing.prefill_worker)
            one = await ask_about(client, **first.ways()[0])
            two = await ask_about(client, **turn.ways()[0])
        assert (one.token_ids, two.token_ids) == (first.answer, turn.answer)
        assert one.end.timing.prefill_worker != two.end.timing.prefill_worker
        loads = cluster.loads()
        pulled_blocks = sum(load.prefix_blocks_pulled for load in loads.values())
        assert pulled_blocks == len(first.ids) // HIT_TOKENS * HIT_TOKENS // 16
        known = usable_prefix(case.reference, turn.ids, len(first.ids), HIT_TOKENS)
        assert two.end.usage.cached_tokens == known
        cluster.assert_no_leaks()


@pytest.mark.full
@pytest.mark.parametrize("model", ["qwen2_5_vl", "gemma3", "gemma3_crops"])
async def test_encoder_exact_when_decode_runs_out_of_blocks(vision_cases: VisionCases, model: str) -> None:
    """Whoever has to give way begins anew at prefill, with its pictures and what it has said so far."""
    case = vision_cases(model)
    maker = QuestionMaker(case.reference, num_tokens=40)
    questions = [maker.chat(f"long {index}", (9, "A", 5 + index)) for index in range(8)]
    # Five are let in, each with a block to grow into; their answers need three.
    room = 5 * (max(len(question.ids) for question in questions) // 16 + 2) + 1
    text = {"model": case.model_dir, "block_tokens": 16, "max_num_seqs": 8}
    with (
        serve("encoder", model=case.model_dir) as encoder,
        serve("prefill", peers=encoder, **{**text, "kv_blocks": 256}) as prefill,
        serve("decode", peers=prefill, **{**text, "kv_blocks": room}) as decode,
        serve("router", model=case.model_dir, encoder=encoder, prefill=prefill, decode=decode) as target,
    ):
        async with AsyncClient(target) as client:
            asked = [ask_about(client, max_tokens=40, **question.ways()[0]) for question in questions]
            answers = await asyncio.gather(*asked)
    assert [one.token_ids for one in answers] == [question.answer for question in questions]
    assert max(one.end.timing.attempts for one in answers) > 1, "nobody had to give way"
