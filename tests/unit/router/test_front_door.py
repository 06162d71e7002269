"""What a client meets at the router's port: refusals, limits, keys, drain, slow readers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_relay import RelayMaker
from fake_worker import MAX_MODEL_LEN, VOCAB_SIZE, decode_well, prefill_well, token_of
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.v1 import common_pb2
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay_client import AsyncClient
from kvrelay_core.errors import (
    ConfigError,
    DrainingError,
    InvalidRequestError,
    OverloadedError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedError,
)
from kvrelay_core.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from kvrelay_core.rpc.status import error_from_rpc
from kvrelay_router.auth import read_api_keys
from kvrelay_router.chat_template import ChatTemplate
from kvrelay_router.config import RequestLimits
from kvrelay_router.main import INFERENCE_SERVICE, load_checkpoint

NAN, INF = float("nan"), float("inf")

# (what is wrong, options, error, words of its message)
BAD_REQUESTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"token_ids": []}, InvalidRequestError, "the prompt is empty"),
    ({"token_ids": [1] * MAX_MODEL_LEN}, InvalidRequestError, f"the prompt has {MAX_MODEL_LEN} tokens"),
    ({"token_ids": [VOCAB_SIZE]}, InvalidRequestError, f"0 to {VOCAB_SIZE - 1}"),
    ({"messages": []}, InvalidRequestError, "messages is empty"),
    ({"messages": [{"role": "", "content": "hi"}]}, InvalidRequestError, "no role"),
    ({"temperature": NAN}, InvalidRequestError, "sampling.temperature is nan; allowed: at least 0"),
    ({"temperature": INF}, InvalidRequestError, "sampling.temperature is inf"),
    ({"temperature": -0.1}, InvalidRequestError, "sampling.temperature is -0.1"),
    ({"top_p": 0.0}, InvalidRequestError, "sampling.top_p is 0; allowed: above 0 and at most 1"),
    ({"top_p": 1.1}, InvalidRequestError, "sampling.top_p"),
    ({"min_p": 2.0}, InvalidRequestError, "sampling.min_p"),
    ({"repetition_penalty": 0.0}, InvalidRequestError, "sampling.repetition_penalty"),
    ({"frequency_penalty": -3.0}, InvalidRequestError, "at least -2 and at most 2"),
    ({"presence_penalty": NAN}, InvalidRequestError, "sampling.presence_penalty"),
    ({"max_tokens": 0}, InvalidRequestError, "sampling.max_tokens is 0"),
    ({"max_tokens": MAX_MODEL_LEN}, InvalidRequestError, f"1 to {MAX_MODEL_LEN - 2}"),
    ({"max_tokens": 4, "min_tokens": 5}, InvalidRequestError, "sampling.min_tokens is 5"),
    ({"n": 0}, InvalidRequestError, "sampling.n is 0; allowed: 1 to 16"),
    ({"n": 17}, InvalidRequestError, "sampling.n"),
    ({"logprobs": 21}, InvalidRequestError, "0 to 20"),
    ({"stop": ["x"] * 17}, InvalidRequestError, "a list of 17; allowed: at most 16"),
    ({"stop": [""]}, InvalidRequestError, "sampling.stop"),
    ({"stop": ["x" * 300]}, InvalidRequestError, "a string of 300 characters"),
    ({"stop_token_ids": [VOCAB_SIZE]}, InvalidRequestError, "sampling.stop_token_ids"),
    ({"logit_bias": {VOCAB_SIZE: 1.0}}, InvalidRequestError, "sampling.logit_bias"),
    ({"logit_bias": {1: INF}}, InvalidRequestError, "sampling.logit_bias"),
    ({"ttft_ms": -1.0}, InvalidRequestError, "slo.ttft_ms"),
    ({"session_id": "x" * 300}, InvalidRequestError, "session_id is 300 characters"),
    ({"model": "other"}, UnknownModelError, "'other' is not served here; use 'fake'"),
]


@pytest.mark.parametrize(("options", "kind", "words"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
async def test_bad_input_is_refused_by_name(
    make_relay: RelayMaker, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    relay = await make_relay()
    prompted = options if {"token_ids", "messages"} & options.keys() else {"token_ids": [1, 2], **options}
    with pytest.raises(kind) as caught:
        await relay.client.complete_all(**prompted)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert not relay.prefill[0].calls


async def test_no_prompt_and_media_are_refused(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    image = common_pb2.MediaItem(mime_type="image/png", data=b"x")
    for request, kind in (
        (pb.GenerateRequest(), InvalidRequestError),
        (pb.GenerateRequest(text="look", media=[image]), UnsupportedError),
    ):
        async with open_channel(relay.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await InferenceServiceStub(channel).Generate(request).read()
        assert type(error_from_rpc(caught.value, "router")) is kind


async def test_a_message_of_100_mb_is_refused_with_the_limit(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    with pytest.raises(InvalidRequestError, match=f"a message may have {MAX_MESSAGE_BYTES}"):
        await relay.client.complete("x" * 100_000_000)
    async with open_channel(relay.address) as channel:  # of a client that does not look
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="x" * 100_000_000)).read()
    error = error_from_rpc(caught.value, "router")
    assert isinstance(error, OverloadedError) and str(MAX_MESSAGE_BYTES) in error.message
    info = await relay.client.model_info()
    assert info.max_model_len == MAX_MODEL_LEN


async def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    with pytest.raises(InvalidRequestError, match="text has 9000000 characters"):
        await relay.client.complete("x" * 9_000_000)


async def test_a_long_text_is_tokenized_and_then_refused_by_its_tokens(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    with pytest.raises(InvalidRequestError, match="the prompt has 3001 tokens"):
        await relay.client.complete("\n" * 3000)


async def test_text_and_messages_become_the_models_tokens(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.decode[0].behaviour = decode_well
    tokenizer = load_checkpoint(str(relay.checkpoint)).tokenizer
    assert tokenizer is not None
    begin, turn, role = 380, 382, 383
    plain = relay.client.complete("hi", max_tokens=2)
    chat = relay.client.complete(messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    prompts = []
    for request in (plain, chat):
        answer = asyncio.ensure_future(request)
        call = await relay.prefill[0].next_call()
        await prefill_well(call)
        await answer
        prompts.append(call.generation.prompt)
    assert prompts[0] == (begin, *await tokenizer.encode("hi", add_special_tokens=False))
    assert prompts[1][:2] == (begin, role)
    assert [prompts[1].count(token) for token in (begin, role, turn)] == [1, 2, 1]
    assert tokenizer.decode(prompts[1]) == "user\nhi\nassistant\n"


async def test_defaults_and_seed_are_filled_in(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.decode[0].behaviour = decode_well
    seeds = []
    for _ in range(2):
        answer = asyncio.ensure_future(relay.client.complete(token_ids=[1, 2]))
        call = await relay.prefill[0].next_call()
        await prefill_well(call)
        await answer
        assert call.generation.sampling.max_tokens == MAX_MODEL_LEN - 2
        assert call.generation.sampling.temperature == 1.0
        seeds.append(call.generation.seed)
    assert seeds[0] != seeds[1]


async def test_model_info(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    info = await relay.client.model_info("fake")
    assert (info.model, info.vocab_size, info.eos_token_ids) == ("fake", VOCAB_SIZE, (381, 382))
    assert info.accepts_text and info.accepts_messages and info.fingerprint == b"model"
    with pytest.raises(UnknownModelError):
        await relay.client.model_info("other")


async def test_a_checkpoint_without_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    maker = RelayMaker(tmp_path)
    try:
        relay = await maker()
        relay.prefill[0].behaviour = prefill_well
        relay.decode[0].behaviour = decode_well
        answer = await relay.client.complete(token_ids=[1], max_tokens=3)
        assert (len(answer.token_ids), answer.text) == (3, "")
        with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
            await relay.client.complete("hi", max_tokens=3)
        assert not (await relay.client.model_info()).accepts_text
    finally:
        await maker.close()


async def test_keys_are_checked(make_relay: RelayMaker, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# one a line\nsecret-1\n\nsecret-2\n")
    relay = await make_relay(api_key_file=str(keys))
    for key in (None, "", "secret", "secret-12"):
        async with AsyncClient(relay.address, key) as client:
            with pytest.raises(UnauthenticatedError):
                await client.complete(token_ids=[1])
            with pytest.raises(UnauthenticatedError):
                await client.model_info()
    for key in ("secret-1", "secret-2"):
        async with AsyncClient(relay.address, key) as client:
            assert (await client.model_info()).model == "fake"


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ConfigError, match="no API key"):
        read_api_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot read"):
        read_api_keys(tmp_path / "absent")


async def test_long_messages_are_rendered_off_the_loop(make_relay: RelayMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    threads: list[threading.Thread] = []
    render = ChatTemplate.render

    def watched(self: ChatTemplate, messages: Any) -> str:
        threads.append(threading.current_thread())
        return render(self, messages)

    monkeypatch.setattr(ChatTemplate, "render", watched)
    for content in ("hi", 20 * "short "):
        await relay.client.complete(messages=[{"role": "user", "content": content}], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="allowed: "):
        await relay.client.complete(messages=[{"role": "user", "content": 3000 * "x"}], max_tokens=1)
    assert [thread is threading.main_thread() for thread in threads] == [True, True, False]


async def test_a_drain_lets_running_requests_end_and_refuses_new_ones(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    running = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=4))
    call = await relay.decode[0].next_call()
    drain = asyncio.ensure_future(relay.server.drain())
    async with open_channel(relay.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)
        while (await health.Check(request)).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
    with pytest.raises(DrainingError):
        await relay.client.complete(token_ids=[1], max_tokens=4)
    assert not drain.done()
    await decode_well(call)
    assert len((await running).token_ids) == 4
    assert await drain == 0


async def test_a_drain_abandons_what_takes_too_long(make_relay: RelayMaker) -> None:
    relay = await make_relay(drain_s=0.1)
    running = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=4))
    call = await relay.prefill[0].next_call()
    assert await relay.server.drain() == 1
    with pytest.raises(DrainingError, match="took longer"):
        await running
    await asyncio.wait_for(call.cancelled.wait(), 5)


async def test_too_many_requests_are_shed(make_relay: RelayMaker) -> None:
    relay = await make_relay(limits=RequestLimits(max_concurrent=1))
    running = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=1))
    call = await relay.prefill[0].next_call()
    with pytest.raises(OverloadedError, match="1 requests are in progress"):
        await relay.client.complete(token_ids=[1], max_tokens=1)
    await prefill_well(call)
    await running


async def test_a_client_that_does_not_read_is_cancelled_and_holds_up_nobody(make_relay: RelayMaker) -> None:
    relay = await make_relay(slow_client_s=0.5)
    relay.prefill[0].behaviour = prefill_well
    slow = relay.client.generate(token_ids=[1], max_tokens=500, logprobs=20)
    call = await relay.decode[0].next_call()
    call.accept()
    # Each token carries far more than the transport buffers, and nobody reads.
    logprobs = common_pb2.TokenLogprobs(top=[common_pb2.TokenLogprob(token_id=1, logprob=-1.5)] * 40_000)
    for position in range(80):
        call.tokens((0, position, token_of(0, position)), logprobs=logprobs)
    other = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    await decode_well(await relay.decode[0].next_call())
    assert len((await other).token_ids) == 3
    await asyncio.wait_for(call.aborted.wait(), 20)
    with pytest.raises(OverloadedError, match="read faster"):
        async for _ in slow:
            pass
