"""cuda_ipc's ways of copying a pair's spans, posted directly on its stream: what the GPU's own clock can measure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch

from kvrelay_cli.transfer.pair import Pair
from kvrelay_transfer.connectors.base import BlockSlices, SliceShape, as_blocks
from kvrelay_transfer.connectors.block_runs import merge_runs
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector, CudaIpcEndpoint
from kvrelay_transfer.connectors.device_copy import DeviceCopier, MappedPool
from kvrelay_transfer.connectors.offset_tables import has_fired

IsDone = Callable[[], bool]
ROW_BYTES = 4 << 10  # of a slice: 16 tokens of one head of 128 in two bytes


class DeviceWays:
    """Copies of all of a pair's spans, each way."""

    def __init__(self, pair: Pair, copier: DeviceCopier, source: MappedPool) -> None:
        self.copier = copier
        self.source = source
        self._pool = pair.side.memory.block_rows.view(-1)
        self._remote, self._local = as_blocks(pair.spans.remote), as_blocks(pair.spans.local)
        self._runs = merge_runs(self._remote, self._local)
        rows = pair.layout.block_bytes // ROW_BYTES
        shape = SliceShape(rows, 1, ROW_BYTES, ROW_BYTES, 0, ROW_BYTES, 0)
        zeros = (0,) * len(self._remote)
        self._slices = BlockSlices(shape, zeros, zeros)

    def by_engines(self) -> torch.cuda.Event:
        return self.copier.copy_by_engines(self.source, *self._runs)

    def by_kernel(self) -> torch.cuda.Event:
        return self.copier.copy_by_kernel(self.source, self._remote, self._local)

    def plain(self) -> torch.cuda.Event:
        """As many bytes in one piece."""
        size_bytes = len(self._remote) * self.source.block_bytes
        return self.copier.copy_span(self.source.address, self._pool[:size_bytes])

    def by_rows(self) -> torch.cuda.Event:
        return self.copier.copy_slices(self.source, self._remote, self._local, self._slices)


@contextmanager
def device_ways(pair: Pair) -> Iterator[DeviceWays]:
    connector = pair.side.connector
    assert isinstance(connector, CudaIpcConnector)
    endpoint = msgspec.msgpack.decode(pair.peer.offers[0].endpoint, type=CudaIpcEndpoint)
    address = connector.runtime.open(endpoint.ipc_handle, connector.device_index)
    try:
        yield DeviceWays(pair, connector.copier, MappedPool(address, pair.layout.block_bytes))
    finally:
        torch.cuda.synchronize()
        connector.runtime.close(address, connector.device_index)


class LinkFeed:
    """Posts copies between decode steps: every so many steps as many as are then under way at once."""

    def __init__(self, pair: Pair, post: Callable[[], IsDone], at_once: int, every: int) -> None:
        """`post` posts a copy of all of the pair's spans."""
        self._pair = pair
        self._post = post
        self._at_once = at_once
        self._every = every
        self._steps = 0
        self._under_way: list[IsDone] = []
        self.num_posted = 0

    def keep_going(self) -> None:
        self._under_way = [is_done for is_done in self._under_way if not is_done()]
        if self._steps % self._every == 0:
            while len(self._under_way) < self._at_once:
                self._under_way.append(self._post())
                self.num_posted += 1
        self._steps += 1

    def finish(self) -> None:
        self._pair.wait(lambda: all(is_done() for is_done in self._under_way))


def until_fired(post: Callable[[], torch.cuda.Event]) -> Callable[[], IsDone]:
    def post_and_tell() -> IsDone:
        return functools.partial(has_fired, post())

    return post_and_tell


def spin(pair: Pair, post: Callable[[], torch.cuda.Event]) -> None:
    event = post()
    pair.wait(lambda: has_fired(event))
