from __future__ import annotations

import asyncio

import pytest

from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import InternalError, KvRelayError, OverloadedError
from kvrelay_core.request import TokenLogprobs
from kvrelay_router.choice_output import Piece
from kvrelay_router.response_stream import ResponseStream


def make(max_unsent_tokens: int = 100) -> tuple[ResponseStream, list[KvRelayError]]:
    given_up: list[KvRelayError] = []
    return ResponseStream("id", max_unsent_tokens, given_up.append), given_up


async def test_deltas_are_merged_only_while_nobody_takes_them() -> None:
    stream, _ = make()
    stream.put_piece(0, Piece([1], "a"))
    first = await anext(stream)
    assert list(first.delta.token_ids) == [1] and first.request_id == "id"
    stream.put_piece(0, Piece([2], "b", [TokenLogprobs(-1.0)]))
    stream.put_piece(1, Piece([9], "z"))
    stream.put_piece(0, Piece([3], "c", [TokenLogprobs(-2.0)]))
    merged, other = await anext(stream), await anext(stream)
    assert (list(merged.delta.token_ids), merged.delta.text) == ([2, 3], "bc")
    assert [entry.logprob for entry in merged.delta.logprobs] == [-1.0, -2.0]
    assert (other.delta.index, list(other.delta.token_ids)) == (1, [9])


async def test_the_end_comes_after_what_is_queued() -> None:
    stream, _ = make()
    stream.put_piece(0, Piece([1], "a"))
    stream.put_finish(pb.Finish(index=0))
    stream.close()
    stream.put_piece(0, Piece([2], "late"))
    assert [response.WhichOneof("event") async for response in stream] == ["delta", "finish"]


async def test_an_error_comes_after_what_is_queued() -> None:
    stream, _ = make()
    stream.put_piece(0, Piece([1], "a"))
    stream.close(InternalError("broken"))
    stream.close(None)
    assert (await anext(stream)).HasField("delta")
    with pytest.raises(InternalError, match="broken"):
        await anext(stream)


async def test_a_reader_that_waits_is_woken() -> None:
    stream, _ = make()
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    stream.put_piece(0, Piece([1], ""))
    assert list((await reading).delta.token_ids) == [1]


async def test_a_client_too_far_behind_is_given_up_once() -> None:
    stream, given_up = make(max_unsent_tokens=3)
    for token in range(3):
        stream.put_piece(0, Piece([token]))
    await anext(stream)
    for token in range(5):
        stream.put_piece(0, Piece([token]))
    assert [type(error) for error in given_up] == [OverloadedError]
    with pytest.raises(OverloadedError, match="4 tokens behind, and 3 are allowed"):
        await anext(stream)


async def test_nothing_is_sent_for_nothing() -> None:
    stream, _ = make()
    stream.put_piece(0, Piece())
    stream.close()
    assert [response async for response in stream] == []
