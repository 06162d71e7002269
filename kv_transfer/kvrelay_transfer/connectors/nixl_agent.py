"""One NIXL agent: memory that is registered once, reads between prepared lists of spans, progress when asked.

`nixl` is imported when an agent is made, not before. Its exceptions, which share no base class, leave here as
TransferErrors. An agent is not thread-safe: one thread makes it, uses it and closes it. Knows no pools and no peers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay_core.errors import ConfigError, TransferError

IndexArray = npt.NDArray[np.int32]

# For this agent's UCX only; a UCX_* variable of the same name wins over each of them.
_UCX_CONFIG = (
    # UCX emulates READ by messages where the hardware has none (TCP). A reader that dies in such a read crashes the
    # source's process (UCX 1.21), and a stopped source can land data long after: refused (ADR 0012).
    "PROTO_EMULATION_ENABLE=n",
    # For who allows it all the same: half again as fast as by the 8 KiB that UCX takes.
    "TCP_TX_SEG_SIZE=256K",
    "TCP_RX_SEG_SIZE=256K",
)


class MemorySpan(NamedTuple):
    """`kind` is "DRAM" or "VRAM"; `device` is the GPU's number, 0 for DRAM."""

    address: int
    size_bytes: int
    kind: str
    device: int


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what NIXL raises has no base class but this one
        raise TransferError(f"NIXL could not {doing}: {type(error).__name__}: {error}") from error


class PreparedSpans:
    """Equal parts of one span, to be named by their index."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            with suppress(Exception):
                handle.release()


class PostedRead:
    """A read that NIXL has. Its destination may be written until `is_over` says so; `release` does not stop it."""

    def __init__(self, agent: NixlAgent, handle: Any, state: str) -> None:
        self._agent = agent
        self._handle = handle
        self._state = state

    def is_over(self) -> bool:
        """Raises TransferError when it ended without the data; it is over then."""
        if self._state == "PROC":
            try:
                self._state = self._agent.check(self._handle)
            except TransferError:
                self.release()
                raise
        if self._state == "PROC":
            return False
        self.release()
        if self._state != "DONE":
            raise TransferError(f"NIXL ended a read as {self._state}")
        return True

    def note(self, state: str) -> None:
        self._state = state

    def release(self) -> None:
        """Frees the handle. Data of a read that is not over can still land, as long as the agent lives."""
        self._agent.forget(self)
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(Exception):  # it failed before, or is cancelled as far as NIXL can
                handle.release()


class NixlAgent:
    def __init__(self, name: str) -> None:
        """`name` is to be unique in the fleet. Raises ConfigError when NIXL is missing or has no UCX."""
        api = _import_nixl()
        self.name = name
        self._spans: set[PreparedSpans] = set()
        self._reads: set[PostedRead] = set()
        try:
            config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = api.nixl_agent(name, config)
            options = {"ucx_error_handling_mode": "peer", "engine_config": ",".join(_UCX_CONFIG)}
            self._agent.create_backend("UCX", options)
        except Exception as error:
            raise ConfigError(f"NIXL cannot start its UCX backend: {error}; check UCX_* and the nixl wheel") from error

    def register(self, span: MemorySpan) -> None:
        """Raises ConfigError, for instance when the memory may not be locked."""
        try:
            self._agent.register_memory([(span.address, span.size_bytes, span.device, "")], span.kind)
        except Exception as error:
            raise ConfigError(f"NIXL cannot register {span.size_bytes} bytes of {span.kind}: {error}") from error

    def metadata(self) -> bytes:
        """For peers: how to connect, and what is registered by now."""
        return bytes(self._agent.get_agent_metadata())

    def add_remote(self, name: str, metadata: bytes) -> None:
        with _translated("take in the peer's metadata"):
            found = self._agent.add_remote_agent(metadata)
        found = found.decode(errors="replace") if isinstance(found, bytes) else found
        if found != name:
            self.remove_remote(found)
            raise TransferError("the peer's NIXL metadata is of another agent than its offer says")

    def remove_remote(self, name: str) -> None:
        """No read of it may be under way: one that is can land later, and be asked for no more."""
        with suppress(Exception):  # one that failed is gone already
            self._agent.remove_remote_agent(name)

    def prepare(self, remote: str | None, span: MemorySpan, part_bytes: int) -> PreparedSpans:
        """The parts of `span`; of our own memory when `remote` is None."""
        parts = [[span.address, part_bytes, span.device, part_bytes, span.size_bytes // part_bytes]]
        with _translated("prepare the spans of a pool"):
            owner = remote or "NIXL_INIT_AGENT"
            spans = PreparedSpans(self._agent.prep_xfer_dlist(owner, np.array(parts, np.uint64), span.kind))
        self._spans.add(spans)
        return spans

    def let_go(self, spans: PreparedSpans) -> None:
        self._spans.discard(spans)
        spans.release()

    def post_read(self, local: PreparedSpans, to: IndexArray, remote: PreparedSpans, of: IndexArray) -> PostedRead:
        """Part of[i] of `remote` into part to[i] of `local`; neighbours on both sides become one descriptor.

        The whole copy happens in this call, without the GIL, where the reader's CPU does it (CMA).
        """
        with _translated("post a read"):
            handle = self._agent.make_prepped_xfer("READ", local.handle, to, remote.handle, of)
        read = PostedRead(self, handle, "PROC")
        self._reads.add(read)
        try:
            read.note(self._post(handle))
        except TransferError:
            read.release()
            raise
        return read

    def check(self, handle: Any) -> str:
        with _translated("finish a read"):
            return str(self._agent.check_xfer_state(handle))

    def forget(self, read: PostedRead) -> None:
        self._reads.discard(read)

    def progress(self) -> None:
        """Answers peers that connect, and moves what is under way."""
        with suppress(Exception):  # of a peer that is gone; who waits for it learns that from its read
            self._agent.get_new_notifs()

    def close(self) -> None:
        """After this nothing lands any more, whatever was posted."""
        for read in list(self._reads):
            read.release()
        for spans in self._spans:
            spans.release()
        self._spans.clear()
        self._agent = None

    def _post(self, handle: Any) -> str:
        with _translated("post a read"):
            return str(self._agent.transfer(handle))


def _import_nixl() -> Any:
    raises_logging_errors = logging.raiseExceptions
    try:
        import nixl
    except ImportError as error:
        raise ConfigError(f"the nixl connector needs NIXL ({error}): pip install 'kvrelay[nixl]'") from error
    finally:
        logging.raiseExceptions = raises_logging_errors  # which nixl sets for everybody
    logging.getLogger("nixl").setLevel(logging.WARNING)  # it greets on stdout
    return nixl
