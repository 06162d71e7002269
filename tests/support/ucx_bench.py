"""The bench of the ucx connector: source and reader in this process, over shared memory or TCP.

The source is held up by a job on its thread that waits, and interrupted where it is about to read the words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from connector_benches import ConnectorBench, Shapes
from handoff_sides import wait_until

from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, Transfer
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.fence import FenceWords, WordArray

OVER_TCP = {"TLS": "tcp,self"}


class UcxBench(ConnectorBench):
    def __init__(self, shapes: Shapes, options: Mapping[str, str] | None = None) -> None:
        self._options = options
        self._gate = threading.Event()
        super().__init__(shapes)

    def make_connector(self) -> Connector:
        self.source_connector = UcxConnector(self.side.memory, self.clock, options=self._options)
        self.source_connector.serve(self.side.source)
        self.reader_connector = UcxConnector(self.memory, self.clock, self.deadline_s, self._options)
        return self.reader_connector

    def make_offer(self) -> ConnectorOffer:
        return self.source_connector.offer()

    def finish(self, *transfers: Transfer) -> None:
        wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        def act_and_read(words: FenceWords, blocks: npt.NDArray[np.int64]) -> WordArray:
            act()
            return read_words(words, blocks)

        read_words = FenceWords.read_after_copy
        with patch.object(FenceWords, "read_after_copy", act_and_read):
            transfer = self.link.read(read)
            self.finish(transfer)
        return transfer

    def stall(self) -> None:
        self._gate.clear()
        self.source_connector.worker.post(lambda: _wait(self._gate))

    def resume(self) -> None:
        self._gate.set()

    def close(self) -> None:
        self.resume()
        self.link.close()
        # Nothing is left at either side, once the source has heard that the link is gone.
        source, reader = self.source_connector.source, self.reader_connector.reader
        wait_until(lambda: source.num_readers + source.num_chunks_taken + reader.num_chunks_taken == 0)
        self.source_connector.close()
        super().close()
        assert not self.source_connector.worker.is_running and not self.reader_connector.worker.is_running


def _wait(gate: threading.Event) -> None:
    assert gate.wait(timeout=20.0)
