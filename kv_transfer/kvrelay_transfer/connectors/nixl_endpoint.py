"""What a source tells its readers so that they can reach its pool by NIXL, and how they check what they were told."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import PeerInfo
from kvrelay_transfer.connectors.nixl_agent import MemorySpan
from kvrelay_transfer.connectors.nixl_words import words_span
from kvrelay_transfer.embedding_layout import PoolLayout

MAX_ENDPOINT_BYTES = 256 << 10  # a host with 8 network cards needs a few thousand
MAX_BLOCKS = 1 << 31


class NixlEndpoint(Struct, frozen=True, array_like=True):
    """`metadata` is NIXL's own, `digest` its BLAKE2b: NIXL parses it in C, which damaged bytes must not reach."""

    agent_name: str
    metadata: bytes
    digest: bytes
    engine_epoch: bytes
    layout_fingerprint: bytes
    num_blocks: int
    data_address: int
    data_kind: str
    data_device: int
    words_address: int

    def data(self, block_bytes: int) -> MemorySpan:
        return MemorySpan(self.data_address, self.num_blocks * block_bytes, self.data_kind, self.data_device)

    def words(self) -> MemorySpan:
        return words_span(self.words_address, self.num_blocks)


def digest_of(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=16).digest()


def decode_endpoint(encoded: bytes, peer: PeerInfo, layout: PoolLayout) -> NixlEndpoint:
    """`layout` is our own. Raises TransferError unless the endpoint is whole, of this start of the peer, and fits."""
    whose = f"the nixl endpoint of {peer.peer_id}"
    if len(encoded) > MAX_ENDPOINT_BYTES:
        raise TransferError(f"{whose} has {len(encoded)} bytes; at most {MAX_ENDPOINT_BYTES} are read")
    try:
        endpoint = msgspec.msgpack.decode(encoded, type=NixlEndpoint)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"{whose} is one that this version cannot read") from error
    if endpoint.digest != digest_of(endpoint.metadata):
        raise TransferError(f"{whose} arrived damaged")
    if endpoint.engine_epoch != peer.engine_epoch:
        raise TransferError(f"{whose} is of another engine start; connect again")
    if endpoint.layout_fingerprint != layout.fingerprint():
        raise TransferError(f"{whose} leads to a pool of another layout")
    addresses = (endpoint.data_address, endpoint.words_address)
    is_sane = 2 <= endpoint.num_blocks < MAX_BLOCKS and min(addresses) > 0 and max(addresses) < 1 << 63
    if not is_sane or endpoint.data_kind not in ("DRAM", "VRAM") or not 0 <= endpoint.data_device < 1 << 16:
        raise TransferError(f"{whose} contradicts itself")
    return endpoint
