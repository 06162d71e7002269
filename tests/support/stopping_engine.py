"""An engine process that stops itself (SIGSTOP) at a named moment, once, when a test has asked for it by a file.

It is the product's engine with a few methods wrapped: a moment that lies between two instructions cannot be hit from
outside. Files in `RUN_DIR/stops`, each of which holds a number n and goes when it is used:

    accept   the source is about to reserve and to issue a ticket            (for the n-th time from now)
    sealed   the source has sealed blocks and not told anybody yet
    export   the source has copied blocks for a reader and not read their words  (grpc, ucx)
    read     the reader is about to post a read
    copied   the reader's copy has ended and the words are not read              (shm, nixl)
    arrive   the reader has verified all blocks and not released the ticket
    token    the reader is about to append a token of its own
    encode   an encoder is about to compute a batch of images
    issue    an encoder has computed one, and is about to answer with its ticket
    pull     prefill is about to post a read of an embedding; then `copied` and `export` as above
    pulled   prefill has all rows of an embedding and has not asked whether its ticket is good

`alone` stops nothing: while it is there, the source computes nothing as long as a ticket of it has no reader yet, so it
is not through with a prompt before its reader has come. Nor does `stall`: while it is there, reads are not posted and
stay pending, also when they are aborted, as on a network card; later they land where they were told to. While `broken`
is there, reads by shared memory fail on their way. Whoever waits for a stop looks at the process's state.

In the environment, STOPPING_ENGINE_REST_S is how long a connector is left alone at first, in place of half a minute,
and STOPPING_ENGINE_PINNED_S how long an embedding is pinned for its reader, in place of as long.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvrelay_core.errors import TransferError
from kvrelay_engine import link_health, process
from kvrelay_engine.config import load_config
from kvrelay_engine.embeddings.cache import CachedItem
from kvrelay_engine.embeddings.pull import EmbeddingPull
from kvrelay_engine.embeddings.reader import EmbeddingReader
from kvrelay_engine.embeddings.source import EmbeddingSource
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.engine import Engine
from kvrelay_engine.group_pull import GroupPull
from kvrelay_engine.handoff_reader import HandoffReader
from kvrelay_engine.handoff_source import HandoffSource
from kvrelay_transfer.connectors import shm
from kvrelay_transfer.connectors.base import BlockRead, EndedTransfer, Transfer, TransferState
from kvrelay_transfer.connectors.copy_thread import copy_span
from kvrelay_transfer.connectors.nixl_link import NixlLink
from kvrelay_transfer.connectors.ucx_source import UcxSource
from kvrelay_transfer.lease import LeaseState
from kvrelay_transfer.staging import BlockStaging
from kvrelay_transfer.ticket import EmbeddingTicket

F = TypeVar("F", bound=Callable[..., Any])


class Stops:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def stall(self) -> Path:
        return self._folder / "stall"

    @property
    def alone(self) -> Path:
        return self._folder / "alone"

    @property
    def broken(self) -> Path:
        return self._folder / "broken"

    def reach(self, point: str) -> None:
        path = self._folder / point
        try:
            left = int(path.read_text())
        except FileNotFoundError:
            return
        if left > 1:
            path.write_text(str(left - 1))
            return
        path.unlink()
        # To this very thread: it does not get past the call before the process stands still.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def before(self, point: str, function: F) -> F:
        @wraps(function)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            self.reach(point)
            return function(*args, **kwargs)

        return stopping  # type: ignore[return-value]

    def after(self, point: str, function: F) -> F:
        @wraps(function)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.reach(point)
            return result

        return stopping  # type: ignore[return-value]


class StalledTransfer(Transfer):
    """A read that is posted when the file is gone, and runs to its end whoever has aborted it."""

    def __init__(self, post: Callable[[BlockRead], Transfer], read: BlockRead, stall: Path) -> None:
        self._post, self._read, self._stall = post, read, stall
        self._posted: Transfer | None = None

    def poll(self) -> TransferState:
        if self._posted is None:
            if self._stall.exists():
                return TransferState.PENDING
            self._posted = self._post(self._read)
        state = self._posted.poll()
        self.words, self.error = self._posted.words, self._posted.error
        return state

    def abort(self) -> None:
        pass


def breakable(read: Callable[[Any, BlockRead], Transfer], broken: Path) -> Callable[[Any, BlockRead], Transfer]:
    @wraps(read)
    def reading(link: Any, request: BlockRead) -> Transfer:
        return EndedTransfer(TransferError("this way is broken")) if broken.exists() else read(link, request)

    return reading


def accompanied(step: Callable[[Engine], bool], alone: Path) -> Callable[[Engine], bool]:
    @wraps(step)
    def stepping(engine: Engine) -> bool:
        leases = engine.source._leases._leases.values()
        if alone.exists() and any(lease.state is LeaseState.GRANTED for lease in leases):
            return False
        return step(engine)

    return stepping


def shorten_rests(first_s: float) -> None:
    health: Any = link_health
    health._Record = partial(health._Record, rest_s=first_s)


def shorten_pins(pinned_s: float) -> None:
    issue = EmbeddingSource.issue

    def issue_for_less(source: Any, item: CachedItem) -> EmbeddingTicket:
        source._terms = msgspec.structs.replace(source._terms, first_follow_s=pinned_s)
        return issue(source, item)

    patched: Any = EmbeddingSource
    patched.issue = issue_for_less


def install_embeddings(stops: Stops) -> None:
    encoder: Any = EncoderEngine
    encoder._encode = stops.before("encode", EncoderEngine._encode)
    encoder._answer = stops.before("issue", EncoderEngine._answer)
    pull: Any = EmbeddingPull
    pull._post = stops.before("pull", EmbeddingPull._post)
    reader: Any = EmbeddingReader
    reader._check = stops.before("pulled", EmbeddingReader._check)


def install(stops: Stops) -> None:
    install_embeddings(stops)
    post = stops.before("read", GroupPull.post)

    def post_or_stall(
        pull: GroupPull, end: int, peer_id: str, connector: str, read: Callable[[BlockRead], Transfer]
    ) -> None:
        def stalled(request: BlockRead) -> Transfer:
            return StalledTransfer(read, request, stops.stall)

        post(pull, end, peer_id, connector, stalled if stops.stall.exists() else read)

    handoff: Any = GroupPull
    handoff.post = post_or_stall
    patched: Any = HandoffReader
    patched._arrive = stops.before("arrive", HandoffReader._arrive)
    source: Any = HandoffSource
    source.accept = stops.before("accept", HandoffSource.accept)
    source.sealed = stops.before("sealed", HandoffSource.sealed)
    engine: Any = Engine
    engine._append = stops.before("token", Engine._append)
    engine.step = accompanied(Engine.step, stops.alone)
    staging: Any = BlockStaging
    staging.copy_out = stops.after("export", BlockStaging.copy_out)
    copies: Any = shm
    copies.copy_span = stops.after("copied", copy_span)
    copies._ShmLink.read = breakable(copies._ShmLink.read, stops.broken)
    nixl: Any = NixlLink
    nixl.post_words = stops.before("copied", NixlLink.post_words)
    ucx: Any = UcxSource
    ucx._send_words = stops.before("export", UcxSource._send_words)


if __name__ == "__main__":
    folder = Path(load_config(sys.argv[sys.argv.index("--config") + 1]).run_dir) / "stops"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    install(Stops(folder))
    if rest_s := os.environ.get("STOPPING_ENGINE_REST_S"):
        shorten_rests(float(rest_s))
    if pinned_s := os.environ.get("STOPPING_ENGINE_PINNED_S"):
        shorten_pins(float(pinned_s))
    sys.exit(process.main())
