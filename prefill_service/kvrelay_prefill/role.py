"""Puts the prefill service together: its requests, the KV source for readers, what links the two, and the workers
that it pulls the beginnings of prompts and the embeddings of images from."""

from __future__ import annotations

from kvrelay.v1 import kv_source_pb2_grpc, prefill_pb2_grpc
from kvrelay_core.errors import KvRelayError
from kvrelay_core.rpc.server import RpcServer
from kvrelay_prefill.embedding_sources import EmbeddingSources
from kvrelay_prefill.requests import PrefillRequests
from kvrelay_prefill.servicer import PrefillServicer
from kvrelay_worker.fetch_client import FetchClient
from kvrelay_worker.kv_source import KvSourceServicer
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.prefix_lookups import PrefixLookups
from kvrelay_worker.server import Role
from kvrelay_worker.worker import Worker


class PrefillRole(Role):
    service_names = ("kvrelay.v1.PrefillService", "kvrelay.v1.KvSourceService")

    def __init__(self, worker: Worker) -> None:
        self.requests = PrefillRequests(worker)
        self.kv_source = KvSourceServicer(worker, self.requests)
        self.peers = PeerBook(worker)
        self.servicer = PrefillServicer(worker, self.requests, EmbeddingSources(worker, self.peers))
        self.fetches = FetchClient(worker, self.peers)
        self.lookups = PrefixLookups(worker, self.peers, self.requests.trace_of)

    def add_to(self, server: RpcServer) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.servicer, server.server)
        kv_source_pb2_grpc.add_KvSourceServiceServicer_to_server(self.kv_source, server.server)

    def end_all(self, error: KvRelayError) -> None:
        self.requests.fail_all(error)
        self.kv_source.follows.end_all(error)
        self.servicer.end_all(error)

    async def close(self) -> None:
        await self.peers.close()
