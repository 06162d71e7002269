"""Decoding beside the loop: order, the budget of memory, items that are given up, and the end of the threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from encoder_rig import FakeInput

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.video import MediaContent
from kvrelay_engine.encoder import decode_threads
from kvrelay_engine.encoder.decode_threads import DecodeThreads
from kvrelay_engine.encoder.decoding import Decoding

WAIT_S = 10.0  # for threads; they need microseconds


class Processor:
    """An item takes ten bytes for each of its own; each goes on when the test lets it."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.changed = threading.Condition()
        self._let: set[bytes] = set()
        self._all = False

    def decoding_bytes(self, data: MediaContent) -> int:
        assert isinstance(data, bytes)
        if data == b"no header":
            raise InvalidRequestError("no image")
        return 10 * len(data)

    def process(self, data: MediaContent) -> FakeInput:
        assert isinstance(data, bytes)
        with self.changed:
            self.begun.append(data)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self._all or data in self._let, WAIT_S)
        if data == b"bad":
            raise InvalidRequestError("no image")
        return FakeInput(data)

    def let(self, *data: bytes) -> None:
        """These end; none named: all do."""
        with self.changed:
            self._let |= set(data)
            self._all |= not data
            self.changed.notify_all()

    def await_begun(self, *data: bytes) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: set(data) <= set(self.begun), WAIT_S), self.begun


@contextmanager
def decoding(
    num_threads: int = 2, max_bytes: int = 10**6, small_bytes: int = 0
) -> Iterator[tuple[Processor, DecodeThreads[FakeInput]]]:
    """`small_bytes`: up to here an item may overtake others."""
    processor = Processor()
    with patch.object(decode_threads, "SMALL_BYTES", small_bytes):
        threads = DecodeThreads(processor, num_threads, max_bytes)
        yield from _running(processor, threads, num_threads)


def _running(
    processor: Processor, threads: DecodeThreads[FakeInput], num_threads: int
) -> Iterator[tuple[Processor, DecodeThreads[FakeInput]]]:
    before = [thread for thread in threading.enumerate() if thread.name.startswith("decode ")]
    assert len(before) == num_threads + 1, "and one for small items"
    try:
        yield processor, threads
    finally:
        processor.let()
        threads.close()
        assert not any(thread.is_alive() for thread in before)


def take(threads: DecodeThreads[FakeInput], count: int) -> list[Decoding[FakeInput]]:
    """As many as were asked for, as they end."""
    taken: list[Decoding[FakeInput]] = []

    def have_all() -> bool:
        taken.extend(threads.take_finished())
        return len(taken) >= count

    await_true(have_all)
    assert len(taken) == count
    return taken


def await_true(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.001)):
        if is_so():
            return
        pause.wait(0.001)
    raise AssertionError("it did not come to that")


def test_items_are_begun_in_the_order_in_which_they_came() -> None:
    with decoding(num_threads=1) as (processor, threads):
        processor.let()
        items = [bytes([letter]) for letter in b"abcdefgh"]
        submitted = [threads.submit(item) for item in items]
        assert take(threads, 8) == submitted and processor.begun == items
        assert [one.result for one in submitted] == [FakeInput(item) for item in items]


def test_a_small_item_overtakes_a_large_one() -> None:
    with decoding() as (processor, threads):
        large, small = threads.submit(b"large" * 100), threads.submit(b"small")
        processor.let(b"small")
        assert take(threads, 1) == [small]
        processor.let()
        assert take(threads, 1) == [large]


def test_small_items_do_not_queue_behind_large_ones() -> None:
    with decoding(num_threads=1, small_bytes=5) as (processor, threads):
        large = [threads.submit(b"large" * 100) for _ in range(3)]
        small = [threads.submit(b"one"), threads.submit(b"two")]
        processor.let(b"one", b"two")
        assert take(threads, 2) == small
        processor.let()
        assert take(threads, 3) == large


def test_small_items_do_not_keep_a_large_one_from_its_memory() -> None:
    with decoding(max_bytes=500, small_bytes=5) as (processor, threads):
        processor.let()
        [held] = take_one(threads, b"four")  # takes 400
        large = threads.submit(b"." * 40)
        await_true(lambda: threads.is_short)
        small = threads.submit(b"one")
        assert processor.begun == [b"four"], "there would be room for the small one"
        threads.end(held)
        [first] = take(threads, 1)
        threads.end(first)
        [second] = take(threads, 1)
        assert {first, second} == {large, small}


def test_what_is_bad_is_an_error() -> None:
    with decoding() as (processor, threads):
        processor.let()
        taken = [*take_one(threads, b"no header"), *take_one(threads, b"bad")]
        assert all(isinstance(one.error, InvalidRequestError) and one.result is None for one in taken)
        assert threads.is_idle and processor.begun == [b"bad"], "without a header nothing is decoded"


def take_one(threads: DecodeThreads[FakeInput], data: bytes) -> list[Decoding[FakeInput]]:
    threads.submit(data)
    return take(threads, 1)


def test_an_item_waits_until_there_is_memory_for_it() -> None:
    """What is decoded counts until it is done with: 100 bytes a byte of the item, after 10 while it is decoded."""
    with decoding(max_bytes=500) as (processor, threads):
        processor.let()
        first, second = threads.submit(b"four"), threads.submit(b"." * 11)
        assert take(threads, 1) == [first]
        assert processor.begun == [b"four"], "400 + 110 bytes are too many"
        threads.end(first)
        assert take(threads, 1) == [second]
        threads.end(second)
        assert threads.is_idle


def test_an_item_beyond_the_budget_is_decoded_alone() -> None:
    with decoding(max_bytes=5) as (processor, threads):
        processor.let()
        [item] = take_one(threads, b"too large")
        assert item.result == FakeInput(b"too large")
        threads.end(item)


def test_an_item_that_is_given_up_before_it_is_begun_is_not_decoded() -> None:
    with decoding(num_threads=1) as (processor, threads):
        running, waiting, last = (threads.submit(data) for data in (b"running", b"waiting", b"last"))
        processor.await_begun(b"running")
        threads.end(waiting)
        processor.let()
        assert take(threads, 2) == [running, last] and processor.begun == [b"running", b"last"]


def test_an_item_that_is_given_up_while_it_is_decoded_is_thrown_away() -> None:
    """Its memory counts until its thread is done with it."""
    with decoding(max_bytes=100) as (processor, threads):
        item, other = threads.submit(b"given up"), threads.submit(b"other")
        processor.await_begun(b"given up")
        threads.end(item)
        assert not threads.is_idle and processor.begun == [b"given up"], "no room for the other one yet"
        processor.let()
        assert take(threads, 1) == [other] and item.result is None
        threads.end(other)
        await_true(lambda: threads.is_idle)


def test_an_item_that_is_given_up_while_it_waits_for_memory_is_not_decoded() -> None:
    with decoding(max_bytes=100) as (processor, threads):
        item, waiting = threads.submit(b"first"), threads.submit(b"waiting")
        processor.await_begun(b"first")
        threads.end(waiting)
        processor.let()
        assert take(threads, 1) == [item] and processor.begun == [b"first"]
        threads.end(item)
        await_true(lambda: threads.is_idle)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_end_waits_for_what_was_begun(num_threads: int) -> None:
    items = [b"item %d" % index for index in range(num_threads)]
    with decoding(num_threads) as (processor, threads):
        submitted = [threads.submit(item) for item in items]
        processor.await_begun(*items)
        closing = threading.Thread(target=threads.close)
        closing.start()
        closing.join(0.01)
        assert closing.is_alive()
        processor.let()
        closing.join(WAIT_S)
        assert not closing.is_alive() and all(one.result is not None for one in submitted)
        threads.submit(b"too late")
    assert b"too late" not in processor.begun
