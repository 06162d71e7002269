"""Puts the decode service together: its requests, the sources that it reads, the socket half of fetches, and the KV
source for workers that go on where it was."""

from __future__ import annotations

from kvrelay.v1 import decode_pb2_grpc, kv_source_pb2_grpc
from kvrelay_core.errors import KvRelayError
from kvrelay_core.rpc.server import RpcServer
from kvrelay_decode.requests import DecodeRequests
from kvrelay_decode.servicer import DecodeServicer
from kvrelay_worker.fetch_client import FetchClient
from kvrelay_worker.kv_source import KvSourceServicer
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.prefix_lookups import PrefixLookups
from kvrelay_worker.server import Role
from kvrelay_worker.worker import Worker

FAREWELL_S = 0.5


class DecodeRole(Role):
    service_names = ("kvrelay.v1.DecodeService", "kvrelay.v1.KvSourceService")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.peers = PeerBook(worker)
        self.fetches = FetchClient(worker, self.peers)
        self.requests = DecodeRequests(worker, self.peers)
        self.servicer = DecodeServicer(worker, self.requests)
        self.lookups = PrefixLookups(worker, self.peers, self.requests.trace_of)
        self.kv_source = KvSourceServicer(worker)

    def add_to(self, server: RpcServer) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.servicer, server.server)
        kv_source_pb2_grpc.add_KvSourceServiceServicer_to_server(self.kv_source, server.server)

    def end_all(self, error: KvRelayError) -> None:
        self.requests.fail_all(error)
        self.servicer.end_all(error)
        self.kv_source.follows.end_all(error)

    async def close(self) -> None:
        # Tickets that were given back are only worth something if their sources hear of it.
        await self._worker.request_tasks.settle(FAREWELL_S)
        await self.peers.close()
