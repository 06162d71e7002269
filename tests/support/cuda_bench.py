"""The bench of cuda_ipc: the source's pool lies in another process, and a read is held up in the GPU's stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from connector_benches import NUM_TOKENS, ConnectorBench, Shapes
from cuda_source import CudaSource
from handoff_sides import LAYOUT, SourceSide, wait_until

from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, PeerInfo, Transfer
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector
from kvrelay_transfer.ticket import KvTicket

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
_WAIT_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ


class StreamGate:
    """Holds up what is posted on a CUDA stream after `shut` until `open`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._level = torch.zeros(1, dtype=torch.int32).pin_memory()  # which the GPU reads over the bus
        self._wanted = 0

    def shut(self) -> None:
        self._wanted += 1
        code = self._driver.cuStreamWaitValue32_v2(
            ctypes.c_void_p(self._stream.cuda_stream),
            ctypes.c_uint64(self._level.data_ptr()),
            ctypes.c_uint32(self._wanted),
            ctypes.c_uint(_WAIT_GREATER_OR_EQUAL),
        )
        assert code == 0, f"cuStreamWaitValue32 failed with {code}"

    def open(self) -> None:
        self._level[0] = self._wanted


class _RemoteSide:
    """As much of a SourceSide as the contract suite looks at."""

    def __init__(self, source: CudaSource, directory: Path, device: str) -> None:
        self._source = source
        self._device = device
        self.opened = source.open_ticket(LAYOUT, NUM_TOKENS, directory / "source.sock")
        self.memory = self
        self.words = self
        self.overwrite = source.overwrite
        self.close = source.close_pool

    @property
    def block_rows(self) -> torch.Tensor:
        return self._source.block_rows().view(-1, LAYOUT.block_bytes).to(self._device)

    def read(self, block: int) -> int:
        """Its fence word."""
        [word] = self._source.words((block,))
        return word

    def peer(self, *offers: ConnectorOffer) -> PeerInfo:
        return self.opened.peer


class CudaIpcBench(ConnectorBench):
    device = "cuda:0"
    can_recall = False

    def __init__(self, source: CudaSource, directory: Path) -> None:
        self._remote = _RemoteSide(source, directory, self.device)
        super().__init__(Shapes())

    def make_side(self) -> SourceSide:
        return cast(SourceSide, self._remote)

    def make_ticket(self) -> KvTicket:
        assert self._remote.opened.ticket is not None
        return self._remote.opened.ticket

    def make_connector(self) -> Connector:
        self.cuda_ipc = CudaIpcConnector(self.memory, self.clock, None, self.deadline_s)
        self.gate = StreamGate(self.cuda_ipc.copier.stream)
        return self.cuda_ipc

    def make_offer(self) -> ConnectorOffer:
        return self._remote.opened.offer

    def finish(self, *transfers: Transfer) -> None:
        wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        transfer = self.link.read(read)
        self.cuda_ipc.copier.stream.synchronize()
        act()
        self.finish(transfer)
        return transfer

    def stall(self) -> None:
        self.gate.shut()

    def resume(self) -> None:
        self.gate.open()

    def close(self) -> None:
        self.resume()
        super().close()
