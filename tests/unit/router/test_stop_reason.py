"""An answer that ends with its very first token says the same of its end, whichever worker brings the token first."""

from __future__ import annotations

from typing import Any

import pytest
from fake_relay import RelayMaker
from fake_worker import token_of

from kvrelay_client import Finish
from kvrelay_core.request import FinishReason, FirstToken

EOS, STOP_ID = 381, token_of(0, 0)  # the fake checkpoint's, and one that the client chose


@pytest.mark.parametrize("token", [EOS, STOP_ID])
@pytest.mark.parametrize("decode_is_first", [False, True])
async def test_the_token_that_ended_an_answer_at_once_is_told_whoever_brings_it(
    make_relay: RelayMaker, decode_is_first: bool, token: int
) -> None:
    relay = await make_relay()
    sampling: dict[str, Any] = {"stop_token_ids": [STOP_ID]}
    async with relay.client.generate(token_ids=[1], max_tokens=4, **sampling) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        decode = await relay.decode[0].next_call()
        if decode_is_first:
            decode.accept()
            decode.tokens((0, 0, token))
            decode.end(1, reason=FinishReason.STOP, stop_token_id=token)
        else:
            prefill.finish([FirstToken(0, 0, token, finish_reason=FinishReason.STOP)])
        (finish,) = [event async for event in stream if isinstance(event, Finish)]
    assert (finish.reason, finish.stop_reason) == (FinishReason.STOP, str(token))


async def test_a_first_token_that_is_the_last_one_by_length_names_none(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=1) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        prefill.finish()
        (finish,) = [event async for event in stream if isinstance(event, Finish)]
    assert (finish.reason, finish.stop_reason) == (FinishReason.LENGTH, "")
