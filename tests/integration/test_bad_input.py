"""Bad input gets the fitting status and a message that says what to change; nothing is lost by it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from answers import ask_greedy
from cluster import Cluster
from oracle import make_prompt

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub

pytestmark = [pytest.mark.cluster]

VOCAB_SIZE = 384
NAN = float("nan")


def request(sampling: dict[str, Any] | None = None, **fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "messages"} & fields.keys():
        fields["token_ids"] = pb.TokenIds(ids=[1, 2, 3])
    made = pb.GenerateRequest(**fields)
    for name, value in (sampling or {}).items():
        if isinstance(value, list):
            getattr(made.sampling, name).extend(value)
        elif isinstance(value, dict):
            getattr(made.sampling, name).update(value)
        else:
            setattr(made.sampling, name, value)
    return made


def ids(*values: int) -> pb.TokenIds:
    return pb.TokenIds(ids=values)


TABLE: dict[str, tuple[pb.GenerateRequest, str, str]] = {
    "no prompt": (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
    "empty ids": (request(token_ids=ids()), "INVALID_ARGUMENT", "prompt"),
    "id out of vocabulary": (request(token_ids=ids(1, VOCAB_SIZE)), "INVALID_ARGUMENT", "0 to 383"),
    "huge id": (request(token_ids=ids(2**32 - 1)), "INVALID_ARGUMENT", "0 to 383"),
    "too long": (request(token_ids=ids(*[1] * 5000)), "INVALID_ARGUMENT", "4096"),
    "too many tokens": (request({"max_tokens": 100_000}), "INVALID_ARGUMENT", "max_tokens"),
    "max_tokens 0": (request({"max_tokens": 0}), "INVALID_ARGUMENT", "max_tokens"),
    "min over max": (request({"max_tokens": 2, "min_tokens": 3}), "INVALID_ARGUMENT", "min_tokens"),
    "temperature beyond float32": (request({"temperature": 1e39}), "INVALID_ARGUMENT", "temperature"),
    "penalty that vanishes": (request({"repetition_penalty": 1e-50}), "INVALID_ARGUMENT", "repetition_penalty"),
    "temperature NaN": (request({"temperature": NAN}), "INVALID_ARGUMENT", "temperature"),
    "temperature negative": (request({"temperature": -1}), "INVALID_ARGUMENT", "temperature"),
    "temperature infinite": (request({"temperature": float("inf")}), "INVALID_ARGUMENT", "temperature"),
    "top_p 0": (request({"top_p": 0}), "INVALID_ARGUMENT", "top_p"),
    "top_p above 1": (request({"top_p": 1.5}), "INVALID_ARGUMENT", "top_p"),
    "top_p NaN": (request({"top_p": NAN}), "INVALID_ARGUMENT", "top_p"),
    "min_p above 1": (request({"min_p": 2}), "INVALID_ARGUMENT", "min_p"),
    "repetition_penalty 0": (request({"repetition_penalty": 0}), "INVALID_ARGUMENT", "repetition_penalty"),
    "frequency_penalty NaN": (request({"frequency_penalty": NAN}), "INVALID_ARGUMENT", "frequency_penalty"),
    "presence_penalty infinite": (
        request({"presence_penalty": float("inf")}), "INVALID_ARGUMENT", "presence_penalty",
    ),
    "n 0": (request({"n": 0}), "INVALID_ARGUMENT", "sampling.n is"),
    "n huge": (request({"n": 10_000}), "INVALID_ARGUMENT", "sampling.n is"),
    "logprobs huge": (request({"logprobs": 10_000}), "INVALID_ARGUMENT", "logprobs"),
    "empty stop string": (request({"stop": [""]}), "INVALID_ARGUMENT", "stop"),
    "stop token out of vocabulary": (request({"stop_token_ids": [9999]}), "INVALID_ARGUMENT", "stop_token_ids"),
    "bias NaN": (request({"logit_bias": {1: NAN}}), "INVALID_ARGUMENT", "logit_bias"),
    "bias out of vocabulary": (request({"logit_bias": {9999: 1.0}}), "INVALID_ARGUMENT", "logit_bias"),
    "unknown model": (request(model="other"), "NOT_FOUND", "tiny"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_each_mistake_is_named(cluster: Cluster, name: str) -> None:
    made, status, word = TABLE[name]
    with grpc.insecure_channel(cluster.target) as channel, pytest.raises(grpc.RpcError) as raised:
        list(InferenceServiceStub(channel).Generate(made, timeout=20))
    error: Any = raised.value
    assert (error.code().name, word in error.details()) == (status, True), error.details()


def test_media_is_refused_as_not_supported(cluster: Cluster) -> None:
    made = request()
    made.media.add(mime_type="image/png", data=b"not an image")
    with grpc.insecure_channel(cluster.target) as channel, pytest.raises(grpc.RpcError) as raised:
        list(InferenceServiceStub(channel).Generate(made, timeout=20))
    error: Any = raised.value
    assert error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
    assert "media" in error.details()


async def test_a_message_of_100_mb_is_refused_and_serving_goes_on(cluster: Cluster) -> None:
    made = request(text="x" * 100_000_000)
    with grpc.insecure_channel(cluster.target) as channel, pytest.raises(grpc.RpcError) as raised:
        list(InferenceServiceStub(channel).Generate(made, timeout=30))
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with cluster.client() as client:
        assert len(await ask_greedy(client, make_prompt(VOCAB_SIZE, 10, 1), 3)) == 3


async def test_a_prompt_above_the_pool_is_refused_with_the_numbers(cluster: Cluster) -> None:
    """The longest prompt that the model takes still gets its answer; one more token does not fit."""
    async with cluster.client() as client:
        assert len(await ask_greedy(client, make_prompt(VOCAB_SIZE, 4000, 1), 3)) == 3
    with grpc.insecure_channel(cluster.target) as channel, pytest.raises(grpc.RpcError) as raised:
        list(InferenceServiceStub(channel).Generate(request(token_ids=ids(*[1] * 4096)), timeout=20))
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "4096" in error.details()
