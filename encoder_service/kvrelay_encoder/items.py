"""The items that the engine is encoding, and who waits for each.

A request gets all its tickets or an error; what it then has no use for is given back: items that wait are aborted,
tickets released. Knows nothing of gRPC, nor of what an item is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvrelay_core.error_info import error_of
from kvrelay_core.errors import KvRelayError, WorkerLostError
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import MediaContent
from kvrelay_engine.encoder_messages import EncodeItem, ItemEncoded
from kvrelay_engine.messages import Abort, ReleaseTicket
from kvrelay_transfer.ticket import EmbeddingTicket
from kvrelay_worker.worker import Worker

_NO_CALL = 0  # nobody waits for the answer


class EncodeItems:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: dict[int, asyncio.Future[EmbeddingTicket]] = {}
        worker.count_live(lambda: len(self._waiting))
        worker.engine.on(ItemEncoded, self._on_encoded)
        worker.engine.on_loss(self.fail_all)
        worker.engine.on_silence(self._on_silence)

    def __len__(self) -> int:
        return len(self._waiting)

    async def encode(self, media: Sequence[MediaContent]) -> list[EmbeddingTicket]:
        """In the order of `media`. Raises the first item's error, whose metadata `media_index` says which it is."""
        self._worker.check_accepting()
        if (silence := self._worker.engine.silence) is not None:
            raise WorkerLostError(silence.message)
        futures: dict[int, asyncio.Future[EmbeddingTicket]] = {}  # by id, in the order of the media
        try:
            for data in media:
                self._send(data, futures)
            await asyncio.wait(futures.values(), return_when=asyncio.FIRST_EXCEPTION)
            for index, future in enumerate(futures.values()):
                if future.done() and (error := future.exception()) is not None:
                    raise _of_item(error, index)
            return [future.result() for future in futures.values()]
        except BaseException:
            self._give_up(futures)
            raise
        finally:
            for request_id in futures:
                self._waiting.pop(request_id, None)

    def fail_all(self, error: KvRelayError) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    def _on_silence(self, error: KvRelayError) -> None:
        """Whoever waits had better ask another encoder: this one may not come back. If it does, it hears of it."""
        for request_id, future in self._waiting.items():
            if not future.done():
                self._worker.engine.notify(Abort(request_id, error.message))
        self.fail_all(WorkerLostError(error.message))

    def _send(self, data: MediaContent, futures: dict[int, asyncio.Future[EmbeddingTicket]]) -> None:
        request_id = next(self._worker.request_ids)
        fingerprint = self._worker.engine.started.model_fingerprint
        self._worker.engine.send(EncodeItem(request_id, media_hash(data, fingerprint), data))
        self._waiting[request_id] = futures[request_id] = asyncio.get_running_loop().create_future()

    def _give_up(self, futures: dict[int, asyncio.Future[EmbeddingTicket]]) -> None:
        for request_id, future in futures.items():
            if not future.done():
                self._worker.engine.notify(Abort(request_id, "its request is over"))
            elif not future.cancelled() and future.exception() is None:
                self._release(future.result())

    def _on_encoded(self, event: ItemEncoded) -> None:
        future = self._waiting.get(event.id)
        if future is None or future.done():  # it crossed with the request's end
            if event.ticket is not None:
                self._release(event.ticket)
        elif event.error is not None:
            future.set_exception(error_of(event.error))
        elif event.ticket is not None:
            future.set_result(event.ticket)

    def _release(self, ticket: EmbeddingTicket) -> None:
        self._worker.engine.notify(ReleaseTicket(_NO_CALL, ticket))


def _of_item(error: BaseException, index: int) -> BaseException:
    if not isinstance(error, KvRelayError):
        return error
    named = type(error)(f"media[{index}]: {error.message}", **error.metadata)
    named.metadata["media_index"] = str(index)
    return named
