"""Implements `Decoder`: threads beside the engine's loop, in the order of arrival, within a budget of memory.

Decoding a large image takes seconds, nearly all of it in C without the interpreter's lock; the loop goes on meanwhile.
What an item takes counts from before it is decoded until the engine has no more use for it; one that alone is beyond
the budget is decoded alone. An item that nobody wants any more is not begun; one that was begun is thrown away.
Knows neither images nor the engine.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic

from kvrelay_core.media.video import MediaContent
from kvrelay_engine.encoder.decoding import Decoding
from kvrelay_engine.encoder.tower import I, Processor


class DecodeThreads(Generic[I]):
    def __init__(self, processor: Processor[I], num_threads: int, max_bytes: int) -> None:
        """`max_bytes` of what is being decoded, and of what is decoded and not done with."""
        self._processor = processor
        self._max_bytes = max_bytes
        self._waiting: deque[Decoding[I]] = deque()
        self._finished: deque[Decoding[I]] = deque()
        self._changed = threading.Condition()  # guards all that follows, and every item's fields
        self._admission = threading.Lock()  # its owner has the oldest item that is not begun
        self._held_bytes = 0
        self._num_running = 0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"decode {index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._waiting and not self._num_running and not self._held_bytes

    def submit(self, data: MediaContent) -> Decoding[I]:
        decoding = Decoding[I](data)
        with self._changed:
            self._waiting.append(decoding)
            self._changed.notify_all()
        return decoding

    def take_finished(self) -> list[Decoding[I]]:
        if not self._finished:  # the usual case, at every turn of the loop
            return []
        with self._changed:
            finished = [one for one in self._finished if not one.is_unwanted]
            self._finished.clear()
        return finished

    def end(self, decoding: Decoding[I]) -> None:
        with self._changed:
            decoding.is_unwanted = True
            decoding.result, decoding.data = None, b""
            if not decoding.is_running:  # else it takes what it takes until its thread is done with it
                self._hold(decoding, 0)

    def close(self) -> None:
        """An item that was begun is decoded to its end before this returns."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------------------------- in the threads

    def _run(self) -> None:
        while (decoding := self._begin()) is not None:
            self._decode(decoding)

    def _begin(self) -> Decoding[I] | None:
        """The oldest item, once there is room for it, or with its error; None at the end."""
        with self._admission:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return None
                decoding = self._waiting.popleft()
                decoding.is_running = True
                self._num_running += 1
                data = decoding.data
            needed = self._measure(decoding, data)
            with self._changed:
                self._changed.wait_for(lambda: self._may_begin(decoding, needed))
                if not decoding.is_unwanted:
                    self._hold(decoding, needed)
        return decoding

    def _measure(self, decoding: Decoding[I], data: MediaContent) -> int:
        try:
            return self._processor.decoding_bytes(data)
        except Exception as error:
            decoding.error = error
            return 0

    def _may_begin(self, decoding: Decoding[I], needed: int) -> bool:
        has_room = not self._held_bytes or self._held_bytes + needed <= self._max_bytes
        return has_room or decoding.is_unwanted or self._is_closed

    def _decode(self, decoding: Decoding[I]) -> None:
        result, error = None, decoding.error
        with self._changed:
            data = b"" if decoding.is_unwanted or self._is_closed else decoding.data
        if data and error is None:
            try:
                result = self._processor.process(data)
            except Exception as failure:
                error = failure
        with self._changed:
            decoding.is_running = False
            self._num_running -= 1
            if decoding.is_unwanted:
                self._hold(decoding, 0)
                return
            decoding.result, decoding.error = result, error
            self._hold(decoding, 0 if result is None else result.num_bytes)
            self._finished.append(decoding)

    def _hold(self, decoding: Decoding[I], num_bytes: int) -> None:
        self._held_bytes += num_bytes - decoding.held_bytes
        decoding.held_bytes = num_bytes
        self._changed.notify_all()
