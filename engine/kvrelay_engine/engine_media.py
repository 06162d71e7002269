"""Images within the engine, under one front: who may start, how far a chunk may reach, what the model is given.

`begin` when a request comes, `forget` when it is over; between them the scheduler asks how far it may go, and the
engine what belongs to a row. A decode engine has no reader: it needs the positions of an image's tokens and never their
embeddings, unless it would have to compute them, which it refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvrelay_core.errors import InvalidRequestError, KvRelayError, UnsupportedError
from kvrelay_core.media.mrope import MropePositions
from kvrelay_core.request import Generation, MediaReference
from kvrelay_engine.embedding_messages import EmbeddingChecked, EmbeddingSourceFailed
from kvrelay_engine.embeddings.reader import EmbeddingReader, EmbeddingsLost
from kvrelay_engine.load_messages import LinkLoad
from kvrelay_engine.media_chunks import clip_chunk, clip_prefix, end_of
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.messages import Command, ConnectPeer, Decode, DisconnectPeer, FetchedPiece, FetchEnded, Prefill
from kvrelay_engine.runner import BatchRow, MediaRows
from kvrelay_engine.sequence import EngineRequest, Sequence
from kvrelay_transfer.embedding_layout import EmbeddingLayout

if TYPE_CHECKING:
    from kvrelay_engine.scheduler import ScheduledRow

# Reads over the socket are numbered by two connectors of one engine; those for embeddings begin here.
FIRST_EMBEDDING_READ = 1 << 40


class EngineMedia:
    def __init__(self, traits: MediaTraits | None = None, reader: EmbeddingReader | None = None) -> None:
        """`traits` of the model; None: it takes no images. `reader`: of an engine that computes prompts."""
        self._traits = traits
        self.reader = reader

    # --------------------------------------------------------------------------------------- begin to end

    def begin(self, request: EngineRequest, command: Prefill | Decode, num_cached: int) -> None:
        """`num_cached` tokens are in the prefix cache now.

        Raises UnsupportedError for a model that takes no images, InvalidRequestError for grids that do not fit their
        placeholders and videos that last too long, MismatchError and PoolExhaustedError for tickets; then nothing is
        held.
        """
        tickets = command.embeddings if isinstance(command, Prefill) else ()
        try:
            self._plant(request)
            if isinstance(command, Prefill) and (request.generation.media or tickets):
                if self.reader is None:
                    raise UnsupportedError("this engine has no pool of embeddings; send the request to prefill")
                self.reader.open(request.id, request.generation.media, tickets, num_cached)
        except KvRelayError:
            if self.reader is not None:
                self.reader.release(tickets)
            raise

    def _plant(self, request: EngineRequest) -> None:
        media = request.generation.media
        if not media:
            return
        if self._traits is None:
            raise UnsupportedError("this worker's model takes no images; send text, or ask for another model")
        if self._traits.mrope is not None:
            positions = MropePositions.of(len(request.generation.prompt), media, self._traits.mrope)
            _check_positions(request.generation, positions.delta, self._traits.max_positions)
            request.positions = positions

    def forget(self, request_id: int) -> None:
        """Idempotent."""
        if self.reader is not None:
            self.reader.close_request(request_id)

    # --------------------------------------------------------------------------------- what the scheduler asks

    def usable_prefix(self, sequence: Sequence, num_cached: int, unit_tokens: int) -> int:
        """How many of `num_cached` tokens, a multiple of `unit_tokens`, may be taken from the prefix cache."""
        if self._traits is None or not self._traits.whole_runs:
            return num_cached
        return clip_prefix(sequence.request.generation.media, num_cached, unit_tokens)

    def can_compute(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether the tokens behind the first `num_cached` can ever be computed here."""
        media = sequence.request.generation.media
        return not media or sequence.request.is_prefill or end_of(media[-1]) <= num_cached

    def may_start(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether there is room for the embeddings that the sequence lacks; it may be given KV blocks then."""
        request = sequence.request
        if self.reader is None or not request.is_prefill or not request.generation.media:
            return True
        return self.reader.has_room(request.id, num_cached)

    def clip(self, sequence: Sequence, num_tokens: int, *, may_overrun: bool) -> int:
        """How many of the sequence's next `num_tokens` may be computed now; more only to keep an image whole."""
        request, media = sequence.request, sequence.request.generation.media
        if not media or sequence.num_computed >= end_of(media[-1]):
            return num_tokens
        whole_runs = self._traits is not None and self._traits.whole_runs

        def is_here(reference: MediaReference) -> bool:
            return self.reader is not None and self.reader.is_here(request.id, reference)

        start = sequence.num_computed
        return clip_chunk(media, start, num_tokens, is_here, whole_runs=whole_runs, may_overrun=may_overrun)

    # -------------------------------------------------------------------------------- what the model is given

    def lay_out(self, rows: Iterable[ScheduledRow]) -> list[BatchRow]:
        """What the runner is given: tokens and blocks, and of images the embeddings and positions."""
        return [self._complete(row.for_runner(), row.sequence) for row in rows]

    def _complete(self, row: BatchRow, sequence: Sequence) -> BatchRow:
        request = sequence.request
        if not request.generation.media:
            return row
        end = row.start + len(row.token_ids)
        positions = None if request.positions is None else request.positions.between(row.start, end)
        return replace(row, media=self._rows(request, row.start, end), positions=positions)

    def _rows(self, request: EngineRequest, start: int, end: int) -> list[MediaRows]:
        """Of placeholders among the tokens [start, end)."""
        rows = []
        for reference in request.generation.media:
            first, stop = max(start, reference.offset), min(end, end_of(reference))
            if first < stop:
                assert self.reader is not None, "an engine without embeddings was to compute an image's tokens"
                part = self.reader.rows(request.id, reference, first - reference.offset, stop - first)
                rows.append(MediaRows(first - start, part))
        return rows

    # --------------------------------------------------------------------------------------- the reader's part

    def takes(self, command: Command) -> bool:
        """Whether the command is for the embeddings' links and reads, and not for those of KV."""
        match command:
            case ConnectPeer(peer):
                return isinstance(peer.layout, EmbeddingLayout)
            case FetchedPiece(read) | FetchEnded(read):
                return read >= FIRST_EMBEDDING_READ
            case EmbeddingSourceFailed() | EmbeddingChecked():
                return True
        return False

    def handle(self, command: Command) -> None:
        """What `takes` took, and every DisconnectPeer: a peer's address tells nothing of what it has."""
        if self.reader is not None and (self.takes(command) or isinstance(command, DisconnectPeer)):
            self.reader.handle(command)

    def poll(self) -> list[EmbeddingsLost]:
        return [] if self.reader is None else self.reader.poll()

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    @property
    def layout(self) -> EmbeddingLayout | None:
        """Of the pool that embeddings are read into."""
        return None if self.reader is None else self.reader.cache.layout

    @property
    def is_busy(self) -> bool:
        return self.reader is not None and self.reader.is_busy

    @property
    def num_transfers(self) -> int:
        return 0 if self.reader is None else self.reader.num_transfers

    @property
    def num_blocks_in_use(self) -> int:
        """Of the embeddings' pool, held by requests or reads."""
        return 0 if self.reader is None else self.reader.cache.pool.num_in_use

    def links(self) -> tuple[LinkLoad, ...]:
        """To encoders."""
        return () if self.reader is None else self.reader.peers.load()

    def check_integrity(self) -> None:
        if self.reader is not None:
            self.reader.check_integrity()


def _check_positions(generation: Generation, delta: int, max_positions: int) -> None:
    """Positions run ahead of tokens, by `delta`, where the time of a video is longer than its tokens are many."""
    most = len(generation.prompt) + generation.sampling.max_tokens + delta
    if delta > 0 and most > max_positions:
        raise InvalidRequestError(
            f"the prompt's video lasts so long that prompt and output reach position {most}; the model has "
            f"{max_positions}; send fewer frames, or ask for fewer tokens",
            field="media",
        )
