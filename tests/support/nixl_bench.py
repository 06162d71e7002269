"""The bench of the nixl connector: two agents of one process, which read each other by CMA.

A read is held up in the clock at which the agent's thread looks before it posts; what happens between data and words
happens in the agent, before it posts the second.
"""

from __future__ import annotations

from collections.abc import Callable

from connector_benches import ConnectorBench, GatedClock, Shapes
from handoff_sides import wait_until

from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, Transfer
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.connectors.nixl_agent import IndexArray, NixlAgent, PostedRead, PreparedSpans


class WatchedAgent(NixlAgent):
    """Tells the number of every read, from 1, before it is posted."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.on_post: Callable[[int], None] = lambda number: None
        self.num_posted = 0

    def post_read(self, local: PreparedSpans, to: IndexArray, remote: PreparedSpans, of: IndexArray) -> PostedRead:
        self.num_posted += 1
        self.on_post(self.num_posted)
        return super().post_read(local, to, remote, of)


class NixlBench(ConnectorBench):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        wait_until(lambda: self.link.probed_gb_per_s() is not None)

    def make_connector(self) -> Connector:
        self.gated = GatedClock("nixl")
        self.source_connector = NixlConnector(self.side.memory, self.clock)
        self.source_connector.serve(self.side.source)
        self.clock = self.gated
        agents: list[WatchedAgent] = []

        class KeptAgent(WatchedAgent):
            def __init__(self, name: str) -> None:
                super().__init__(name)
                agents.append(self)

        connector = NixlConnector(self.memory, self.gated, self.deadline_s, KeptAgent)
        (self.agent,) = agents
        return connector

    def make_offer(self) -> ConnectorOffer:
        return self.source_connector.offer()

    def finish(self, *transfers: Transfer) -> None:
        wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        words = self.agent.num_posted + 2
        self.agent.on_post = lambda number: act() if number == words else None
        transfer = self.link.read(read)
        self.finish(transfer)
        return transfer

    def stall(self) -> None:
        self.gated.gate.clear()

    def resume(self) -> None:
        self.gated.gate.set()

    def close(self) -> None:
        self.resume()
        super().close()
        self.source_connector.close()
