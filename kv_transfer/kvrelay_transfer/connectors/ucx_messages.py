"""What the two sides of the ucx connector say to each other, and the tags that carry it. Knows no UCX.

    reader -> source    ReadRequest, ProbeRequest, ReadAbort, Goodbye     tag TO_SOURCE | link id
    source -> reader    ReadDone, ReadFailed                              tag TO_READER | link id
    source -> reader    the packed chunks of a read or a probe            tag CHUNK | read id | index
    either              one byte, before everything else                  tag HELLO

Link and read ids are random or count from a random start, so that nothing of an earlier life is taken for ours.
"""

from __future__ import annotations

import secrets

import msgspec
from msgspec import Struct

from kvrelay_core.request import ErrorInfo
from kvrelay_transfer.ticket import Ticket

HELLO, TO_SOURCE, TO_READER, CHUNK = 0, 1, 2, 3
_ID_BITS, _INDEX_BITS = 44, 16
_ID_MASK, _INDEX_MASK = (1 << _ID_BITS) - 1, (1 << _INDEX_BITS) - 1
MAX_CHUNKS = _INDEX_MASK + 1

PROBE_CHUNKS = 4


class UcxEndpoint(Struct, frozen=True, array_like=True):
    """How to reach a source: the address of its UCX worker, and the packed chunks that it sends."""

    worker_address: bytes
    engine_epoch: bytes
    host_id: str
    chunk_bytes: int


class ReadRequest(Struct, frozen=True, array_like=True, tag="read"):
    """Send `blocks` (i64, native order) of the ticket, `chunk_blocks` of them in each chunk, to the worker at
    `reader_address`."""

    read_id: int
    reader_address: bytes
    ticket: msgspec.Raw  # encoded
    group: int
    blocks: bytes
    chunk_blocks: int


class ProbeRequest(Struct, frozen=True, array_like=True, tag="probe"):
    """Send PROBE_CHUNKS chunks of `chunk_bytes` that mean nothing."""

    read_id: int
    reader_address: bytes
    chunk_bytes: int


class ReadAbort(Struct, frozen=True, array_like=True, tag="abort"):
    read_id: int


class Goodbye(Struct, frozen=True, array_like=True, tag="goodbye"):
    """The reader closes the link; what is still under way on it is waste."""


class ReadDone(Struct, frozen=True, array_like=True, tag="done"):
    """`words` (u64, native order) were read after the last chunk had been packed."""

    read_id: int
    words: bytes


class ReadFailed(Struct, frozen=True, array_like=True, tag="failed"):
    read_id: int
    error: ErrorInfo


SourceMessage = ReadRequest | ProbeRequest | ReadAbort | Goodbye
ReaderMessage = ReadDone | ReadFailed

ticket_decoder: msgspec.msgpack.Decoder[Ticket] = msgspec.msgpack.Decoder(Ticket)
source_decoder = msgspec.msgpack.Decoder(SourceMessage)
reader_decoder = msgspec.msgpack.Decoder(ReaderMessage)


def new_id() -> int:
    return secrets.randbits(_ID_BITS)


def next_id(previous: int) -> int:
    return previous + 1 & _ID_MASK


def make_tag(kind: int, number: int, index: int = 0) -> int:
    return (kind << _ID_BITS | number) << _INDEX_BITS | index


def split_tag(tag: int) -> tuple[int, int, int]:
    """(kind, id, index)."""
    kind_and_id = tag >> _INDEX_BITS
    return kind_and_id >> _ID_BITS, kind_and_id & _ID_MASK, tag & _INDEX_MASK
