"""RDMA, and whatever else UCX reads without the source's CPU: READs by NIXL out of the peer's registered pool.

One agent per engine, without NIXL's own progress thread (it spins), owned by one thread of ours: the step loop posts
jobs to it and looks at states. It looks after reads under way, the younger the oftener, and answers peers that connect:
often while tickets are open, now and then while the engine is at rest. The rest of a source's part is the hardware's.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import torch

from kvrelay_core.clock import Clock
from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.agent_thread import AgentThread
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer, ExportGate, PeerInfo, PeerLink
from kvrelay_transfer.connectors.nixl_agent import MemorySpan, NixlAgent
from kvrelay_transfer.connectors.nixl_endpoint import NixlEndpoint, decode_endpoint, digest_of
from kvrelay_transfer.connectors.nixl_link import Flight, NixlLink, ReaderSide
from kvrelay_transfer.connectors.nixl_words import Landings, words_span
from kvrelay_transfer.pool_memory import PoolMemory

DEFAULT_DEADLINE_S = 10.0
START_TIMEOUT_S = 60.0  # a large pool is locked page by page
CONNECT_TIMEOUT_S = 5.0
PROBE_BYTES = 16 << 20

# A read is looked at again after a hundredth of the time that it has taken so far, within these bounds.
SHORTEST_READING_TICK_S = 0.00002
LONGEST_READING_TICK_S = 0.0005
LOOKS_IN_A_READ = 100
SERVING_TICK_S = 0.001
RESTING_TICK_S = 0.1  # peers connect before they have a ticket


def has_rdma() -> bool:
    """Whether this host has hardware that NIXL reads other hosts through."""
    return any(Path("/sys/class/infiniband").glob("*"))


class NixlConnector(Connector):
    name = "nixl"

    def __init__(
        self,
        memory: PoolMemory,
        clock: Clock,
        deadline_s: float = DEFAULT_DEADLINE_S,
        agent_type: type[NixlAgent] = NixlAgent,
    ) -> None:
        """Raises ConfigError when NIXL is missing, or cannot register the pool."""
        self._memory = memory
        self._clock = clock
        self._deadline_s = deadline_s
        self._is_serving = False
        self._links: list[NixlLink] = []
        self._side: ReaderSide | None = None  # while there is an agent
        block_bytes = memory.layout.block_bytes
        self._scratch_blocks = max(1, min(PROBE_BYTES // block_bytes, memory.num_blocks))
        scratch_bytes = self._scratch_blocks * block_bytes
        self._scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=memory.tensor.device)
        self._thread = AgentThread("nixl", self._look_after)
        try:
            self._endpoint = self._thread.call(lambda: self._start(agent_type), START_TIMEOUT_S)
        except BaseException:
            self._thread.close()
            raise

    # ------------------------------------------------------------------------------ on the engine's thread

    def offer(self) -> ConnectorOffer:
        return ConnectorOffer(self.name, msgspec.msgpack.encode(self._endpoint))

    def serve(self, gate: ExportGate | None) -> None:
        """Reads are the hardware's work; what a source has to do is to answer readers that connect."""
        self._is_serving = gate is not None
        self._wake()

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        """Blocks while NIXL takes in the peer, for milliseconds; the pair is warmed and probed after that."""
        endpoint = decode_endpoint(offer.endpoint, peer, self._memory.layout)
        return self._thread.call(lambda: self._open(peer.peer_id, endpoint), CONNECT_TIMEOUT_S)

    def close(self) -> None:
        """Ends the agent; what was under way is TORN_DOWN afterwards."""
        self._thread.post(self._stop)
        self._thread.close()

    def _wake(self) -> None:
        self._thread.post(_nothing)

    def _fly(self, link: NixlLink, flight: Flight) -> None:
        self._thread.post(lambda: self._take_up(link, flight))

    # ------------------------------------------------------------------------------- on the agent's thread

    def _start(self, agent_type: type[NixlAgent]) -> NixlEndpoint:
        memory, device = self._memory, self._memory.tensor.device
        kind, index = "DRAM", 0
        if device.type == "cuda":
            torch.cuda.set_device(device)  # UCX works in the context of the thread
            kind, index = "VRAM", device.index or 0
        block_bytes = memory.layout.block_bytes
        data = MemorySpan(memory.data_address, memory.num_blocks * block_bytes, kind, index)
        words = words_span(memory.words.address, memory.num_blocks)
        scratch = MemorySpan(self._scratch.data_ptr(), self._scratch.numel(), kind, index)
        agent = agent_type(f"kvrelay-{memory.engine_epoch.hex()}")
        for span in (data, words):
            agent.register(span)
        metadata = agent.metadata()  # before the rest is registered, which is nobody's to read
        agent.register(scratch)
        self._side = ReaderSide(
            agent=agent,
            memory=memory,
            clock=self._clock,
            deadline_s=self._deadline_s,
            blocks=agent.prepare(None, data, block_bytes),
            landings=Landings(agent),
            scratch=agent.prepare(None, scratch, block_bytes),
            scratch_blocks=self._scratch_blocks,
            fly=self._fly,
            wake=self._wake,
            is_reading=self._is_reading,
        )
        return NixlEndpoint(
            agent_name=agent.name,
            metadata=metadata,
            digest=digest_of(metadata),
            engine_epoch=memory.engine_epoch,
            layout_fingerprint=memory.layout.fingerprint(),
            num_blocks=memory.num_blocks,
            data_address=data.address,
            data_kind=kind,
            data_device=index,
            words_address=words.address,
        )

    def _open(self, peer_id: str, endpoint: NixlEndpoint) -> PeerLink:
        assert self._side is not None, "connect comes before close"
        if self._is_reading(endpoint.agent_name):
            raise TransferError(f"reads of a former link to {peer_id} have not ended; NIXL cannot connect it again yet")
        self._side.agent.add_remote(endpoint.agent_name, endpoint.metadata)
        try:
            link = NixlLink(self._side, peer_id, endpoint)
        except TransferError:
            self._forget(self._side.agent, endpoint.agent_name)
            raise
        self._links.append(link)
        return link

    def _take_up(self, link: NixlLink, flight: Flight) -> None:
        if link in self._links:
            link.flights.append(flight)
        else:
            flight.tear_down()  # the link was closed, and everything before this has ended

    def _look_after(self) -> float:
        if self._side is None:
            return RESTING_TICK_S
        for link in list(self._links):
            link.flights = [flight for flight in link.flights if not flight.advance()]
            if link.is_closed and not link.flights:
                self._links.remove(link)
                link.let_go()
                self._forget(self._side.agent, link.agent_name)
        posted_at_s = [flight.posted_at_s for link in self._links for flight in link.flights]
        if posted_at_s:
            return _reading_tick_s(time.perf_counter() - max(posted_at_s))
        self._side.agent.progress()  # which a look at a read makes too
        return SERVING_TICK_S if self._is_serving else RESTING_TICK_S

    def _is_reading(self, agent_name: str) -> bool:
        links = [link for link in self._links if link.agent_name == agent_name]
        return any(flight.is_posted for link in links for flight in link.flights)

    def _forget(self, agent: NixlAgent, agent_name: str) -> None:
        """Unless another link leads there."""
        if all(link.agent_name != agent_name for link in self._links):
            agent.remove_remote(agent_name)

    def _stop(self) -> None:
        """With the agent goes all that could still land; only then its transfers are told that they are over."""
        side, self._side = self._side, None
        assert side is not None, "close comes once"
        links, self._links = self._links, []
        flights = [flight for link in links for flight in link.flights]
        for link in links:
            link.is_closed = True
        side.agent.close()
        for flight in flights:
            flight.tear_down()


def _reading_tick_s(age_s: float) -> float:
    return min(max(age_s / LOOKS_IN_A_READ, SHORTEST_READING_TICK_S), LONGEST_READING_TICK_S)


def _nothing() -> None:
    """A job that only has the thread look after things now."""
