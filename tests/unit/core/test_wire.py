from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay.v1 import common_pb2 as pb
from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.request import (
    AttemptId,
    ChoiceState,
    FinishReason,
    FirstToken,
    Generation,
    HandoffTiming,
    MediaReference,
    SamplingParams,
    Slo,
    TokenLogprobs,
    Usage,
)
from kvrelay_core.rpc import wire

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FLOAT = st.floats(allow_nan=False)
TOKEN_IDS = st.lists(U32, max_size=5).map(tuple)

SAMPLING = st.builds(
    SamplingParams,
    temperature=FLOAT,
    top_p=FLOAT,
    top_k=U32,
    min_p=FLOAT,
    repetition_penalty=FLOAT,
    frequency_penalty=FLOAT,
    presence_penalty=FLOAT,
    max_tokens=U32,
    min_tokens=U32,
    stop_token_ids=TOKEN_IDS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | U32,
    logit_bias=st.dictionaries(U32, FLOAT, max_size=3),
)
LOGPROBS = st.builds(TokenLogprobs, FLOAT, st.lists(st.tuples(U32, FLOAT), max_size=3).map(tuple))
SECONDS = st.integers(0, 10**6).map(lambda milliseconds: milliseconds / 1e3)
HASH, GRID = st.binary(min_size=32, max_size=32), st.tuples(U32, U32, U32)
MEDIA = st.builds(MediaReference, HASH, st.just(0), U32, GRID, U32) | st.builds(
    MediaReference, HASH, st.just(0), U32, GRID, st.just(0), st.floats(1e-3, 1e6)
)


def behind_each_other(media: list[MediaReference]) -> tuple[MediaReference, ...]:
    return tuple(replace(item, offset=index, num_tokens=1) for index, item in enumerate(media))


GENERATION = st.builds(
    Generation,
    prompt=st.lists(U32, min_size=3, max_size=9).map(tuple),
    sampling=SAMPLING,
    seed=U64,
    choices=st.builds(ChoiceState, U32, TOKEN_IDS).map(lambda choice: (choice,)),
    eos_token_ids=TOKEN_IDS,
    cache_salt=st.text(max_size=5),
    priority=st.integers(-(2**31), 2**31 - 1),
    deadline_s=st.none() | FLOAT,
    slo=st.builds(Slo, st.none() | SECONDS, st.none() | SECONDS),
    media=st.lists(MEDIA, max_size=3).map(behind_each_other),
)


@given(GENERATION)
def test_a_generation_survives_the_wire(generation: Generation) -> None:
    data = wire.generation_to_wire(generation).SerializeToString()
    assert wire.generation_from_wire(pb.Generation.FromString(data)) == generation


@given(st.builds(FirstToken, U32, U32, U32, st.none() | LOGPROBS, st.none() | st.sampled_from(FinishReason)))
def test_a_first_token_survives_the_wire(token: FirstToken) -> None:
    assert wire.first_token_from_wire(wire.first_token_to_wire(token)) == token


def test_small_messages_survive_the_wire() -> None:
    attempt = AttemptId("r", "q", 3)
    assert wire.attempt_from_wire(wire.attempt_to_wire(attempt)) == attempt
    usage = Usage(1, 2, 3)
    assert wire.usage_from_wire(wire.usage_to_wire(usage)) == usage
    timing = HandoffTiming(1, 0.5, 3, 4, "shm")
    assert wire.handoff_timing_from_wire(wire.handoff_timing_to_wire(timing)) == timing


def test_a_reason_of_a_later_release_is_an_error_not_a_crash() -> None:
    assert wire.finish_reason_from_wire(77) is FinishReason.ERROR


@pytest.mark.parametrize(
    "message",
    [
        pb.Generation(),
        pb.Generation(
            prompt_token_ids=[1],
            choices=[pb.ChoiceState(index=0, committed_token_ids=[5]), pb.ChoiceState(index=1)],
        ),
        pb.Generation(prompt_token_ids=[1], choices=[pb.ChoiceState(index=0), pb.ChoiceState(index=0)]),
        pb.Generation(prompt_token_ids=[1], media=[pb.MediaReference(content_hash=b"short", num_tokens=1)]),
        pb.Generation(prompt_token_ids=[1], media=[pb.MediaReference(content_hash=bytes(32), num_tokens=2)]),
        pb.Generation(
            prompt_token_ids=[1],
            media=[pb.MediaReference(content_hash=bytes(32), num_tokens=1, seconds_per_grid=float("nan"))],
        ),
    ],
)
def test_malformed_generations_are_refused(message: pb.Generation) -> None:
    with pytest.raises(InvalidRequestError):
        wire.generation_from_wire(message)


def test_an_attempt_without_a_request_id_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        wire.attempt_from_wire(pb.AttemptId(router_id="r"))
