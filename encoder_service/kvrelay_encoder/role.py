"""Puts the encoder service together: its items, and the source that prefill reads embeddings from."""

from __future__ import annotations

from kvrelay.v1 import encoder_pb2_grpc, kv_source_pb2_grpc
from kvrelay_core.errors import KvRelayError
from kvrelay_core.rpc.server import RpcServer
from kvrelay_encoder.embedding_source import EmbeddingSourceServicer
from kvrelay_encoder.items import EncodeItems
from kvrelay_encoder.servicer import EncoderServicer
from kvrelay_worker.server import Role
from kvrelay_worker.worker import Worker


class EncoderRole(Role):
    service_names = ("kvrelay.v1.EncoderService", "kvrelay.v1.KvSourceService")

    def __init__(self, worker: Worker) -> None:
        self.items = EncodeItems(worker)
        self.servicer = EncoderServicer(worker, self.items)
        self.source = EmbeddingSourceServicer(worker)

    def add_to(self, server: RpcServer) -> None:
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self.servicer, server.server)
        kv_source_pb2_grpc.add_KvSourceServiceServicer_to_server(self.source, server.server)

    def end_all(self, error: KvRelayError) -> None:
        self.items.fail_all(error)

    async def close(self) -> None:
        """Holds nothing of its own."""
