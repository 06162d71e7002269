"""Implements `Decoder`: threads beside the engine's loop, in the order of arrival, within a budget of memory.

Decoding a large image takes seconds, nearly all of it in C without the interpreter's lock; the loop goes on meanwhile.
What an item takes counts from before it is decoded until the engine has no more use for it; one that alone is beyond
the budget is decoded alone. One thread more takes small files only, so that they do not wait for photographs, unless
these wait for memory. An item that nobody wants any more is not begun; one that was begun is thrown away.
Knows neither images nor the engine.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic

from kvrelay_core.media.video import MediaContent, count_bytes
from kvrelay_engine.encoder.decoding import Decoding
from kvrelay_engine.encoder.free_memory import give_back_free_memory
from kvrelay_engine.encoder.tower import I, Processor

SMALL_BYTES = 256 << 10  # of a file; nearly always a picture of few pixels

LARGE_BYTES = 64 << 20  # that decoding took: worth giving back


class DecodeThreads(Generic[I]):
    def __init__(self, processor: Processor[I], num_threads: int, max_bytes: int) -> None:
        """`num_threads` for items of any size; `max_bytes` of what is being decoded, and of what is decoded and not
        done with."""
        self._processor = processor
        self._max_bytes = max_bytes
        self._numbers = itertools.count()
        self._small: deque[tuple[int, Decoding[I]]] = deque()  # that wait, each with its number
        self._large: deque[tuple[int, Decoding[I]]] = deque()
        self._finished: deque[Decoding[I]] = deque()
        self._changed = threading.Condition()  # guards all that follows, and every item's fields
        self._admission = threading.Lock()  # its owner has the oldest item that is not begun
        self._is_short = False  # and waits for memory
        self._held_bytes = 0
        self._num_running = 0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._begin_any,), name=f"decode {index}", daemon=True)
            for index in range(num_threads)
        ]
        self._threads.append(
            threading.Thread(target=self._run, args=(self._begin_small,), name="decode small", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._small and not self._large and not self._num_running and not self._held_bytes

    @property
    def is_short(self) -> bool:
        """The oldest item that is not begun waits for memory."""
        return self._is_short

    def submit(self, data: MediaContent) -> Decoding[I]:
        decoding = Decoding[I](data)
        with self._changed:
            waiting = self._small if count_bytes(data) <= SMALL_BYTES else self._large
            waiting.append((next(self._numbers), decoding))
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
            self._small.clear()
            self._large.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------------------------- in the threads

    def _run(self, begin: Callable[[], Decoding[I] | None]) -> None:
        while (decoding := begin()) is not None:
            self._decode(decoding)

    def _begin_any(self) -> Decoding[I] | None:
        """The oldest item, once there is room for it, or with its error; None at the end."""
        with self._admission:
            decoding = self._take(lambda: min((self._small, self._large), key=_age_of_first))
            if decoding is None:
                return None
            needed = self._measure(decoding)
            with self._changed:
                self._is_short = not self._may_begin(decoding, needed)
                self._changed.wait_for(lambda: self._may_begin(decoding, needed))
                self._is_short = False
                self._admit(decoding, needed)
        return decoding

    def _begin_small(self) -> Decoding[I] | None:
        """The same of the oldest small item."""
        decoding = self._take(lambda: self._small)
        if decoding is None:
            return None
        needed = self._measure(decoding)
        with self._changed:
            self._changed.wait_for(lambda: self._may_begin(decoding, needed) and not self._is_short)
            self._admit(decoding, needed)
        return decoding

    def _take(self, choose: Callable[[], deque[tuple[int, Decoding[I]]]]) -> Decoding[I] | None:
        with self._changed:
            self._changed.wait_for(lambda: choose() or self._is_closed)
            if self._is_closed:
                return None
            _, decoding = choose().popleft()
            decoding.is_running = True
            self._num_running += 1
        return decoding

    def _measure(self, decoding: Decoding[I]) -> int:
        try:
            return self._processor.decoding_bytes(decoding.data)
        except Exception as error:
            decoding.error = error
            return 0

    def _may_begin(self, decoding: Decoding[I], needed: int) -> bool:
        has_room = not self._held_bytes or self._held_bytes + needed <= self._max_bytes
        return has_room or decoding.is_unwanted or self._is_closed

    def _admit(self, decoding: Decoding[I], needed: int) -> None:
        if not decoding.is_unwanted:
            self._hold(decoding, needed)
        self._changed.notify_all()

    def _decode(self, decoding: Decoding[I]) -> None:
        result, error = None, decoding.error
        with self._changed:
            data = b"" if decoding.is_unwanted or self._is_closed else decoding.data
        if data and error is None:
            try:
                result = self._processor.process(data)
            except Exception as failure:
                error = failure
            if decoding.held_bytes >= LARGE_BYTES:
                give_back_free_memory()
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


def _age_of_first(waiting: deque[tuple[int, Decoding[I]]]) -> float:
    return waiting[0][0] if waiting else math.inf
