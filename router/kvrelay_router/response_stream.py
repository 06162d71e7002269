"""The messages on their way to one client. Putting never waits; one reader takes them out.

A delta that has not been taken yet absorbs the next one of its choice, so messages are merged only when the
writer is behind. A client that is too far behind is given up, typed (PROTOCOL C7).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import KvRelayError, OverloadedError
from kvrelay_core.rpc.wire import logprobs_to_wire
from kvrelay_router.choice_output import Piece


class ResponseStream:
    def __init__(self, request_id: str, max_unsent_tokens: int, on_overflow: Callable[[KvRelayError], None]) -> None:
        """`on_overflow` is called once, when the client is given up."""
        self._request_id = request_id
        self._max_unsent_tokens = max_unsent_tokens
        self._on_overflow = on_overflow
        self._messages: deque[pb.GenerateResponse] = deque()
        self._open_deltas: dict[int, pb.Delta] = {}  # by choice; not taken yet
        self._unsent_tokens = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._error: KvRelayError | None = None

    def put_piece(self, choice: int, piece: Piece) -> None:
        if self._closed or not piece:
            return
        delta = self._open_deltas.get(choice)
        if delta is None:
            response = pb.GenerateResponse(request_id=self._request_id)
            delta = response.delta
            delta.index = choice
            delta.SetInParent()
            self._open_deltas[choice] = delta
            self._messages.append(response)
        delta.token_ids.extend(piece.token_ids)
        delta.text += piece.text
        delta.logprobs.extend(wire for entry in piece.logprobs if (wire := logprobs_to_wire(entry)) is not None)
        self._unsent_tokens += len(piece.token_ids)
        self._changed.set()
        if self._unsent_tokens > self._max_unsent_tokens:
            self._give_up()

    def put_finish(self, finish: pb.Finish) -> None:
        if not self._closed:
            self._open_deltas.pop(finish.index, None)
            self._messages.append(pb.GenerateResponse(request_id=self._request_id, finish=finish))
            self._changed.set()

    def close(self, error: KvRelayError | None = None) -> None:
        """The reader gets what is queued, then the end or the error."""
        if not self._closed:
            self._closed, self._error = True, error
            self._changed.set()

    def _give_up(self) -> None:
        error = OverloadedError(
            f"the client is {self._unsent_tokens} tokens behind, and {self._max_unsent_tokens} are allowed; read faster"
        )
        self._messages.clear()
        self._open_deltas.clear()
        self.close(error)
        self._on_overflow(error)

    def __aiter__(self) -> ResponseStream:
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        response = self._messages.popleft()
        if response.HasField("delta"):
            self._open_deltas.pop(response.delta.index, None)
            self._unsent_tokens -= len(response.delta.token_ids)
        return response
