"""Messages between a service process and its engine process, over ZeroMQ, encoded by msgspec.

Commands go to the engine, events come back; both are tagged unions. `id` names a request within this worker
(chosen by the service); `follow` names a reader's Follow stream; `read` and `export` name one use of the staging
ring (see `kvrelay_transfer.staging`). Streams live in the service; pins, words and tickets live in the engine.
"""

from __future__ import annotations

from enum import StrEnum

from kvrelay_core.request import (
    AttemptId,
    ChoiceState,
    ErrorInfo,
    FinishReason,
    FirstToken,
    Generation,
    HandoffTiming,
    PrefixHint,
    TokenLogprobs,
    Usage,
)
from kvrelay_engine.embedding_messages import (
    EmbeddingCheck,
    EmbeddingChecked,
    EmbeddingRelease,
    EmbeddingSourceFailed,
)
from kvrelay_engine.encoder_messages import EncodeItem, ItemEncoded, Pulse
from kvrelay_engine.load_messages import Load as Load
from kvrelay_engine.message_kinds import Command as Command
from kvrelay_engine.message_kinds import Event as Event
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixFound, PrefixPulled, PrefixTicket, PrefixWanted
from kvrelay_engine.start_messages import Started as Started
from kvrelay_engine.start_messages import StartFailed as StartFailed
from kvrelay_transfer.block_digest import BlockDigest
from kvrelay_transfer.connectors.base import PeerInfo
from kvrelay_transfer.ticket import EmbeddingTicket, GroupBlocks, KvTicket, LeaseTerms, Ticket


class ReleaseReason(StrEnum):
    PULLED = "pulled"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"


# ------------------------------------------------------------------------------------------- commands


class Prefill(Command, frozen=True):
    """Compute the prompt's KV and sample position `len(committed)` of each choice."""

    id: int
    attempt: AttemptId
    generation: Generation
    handoff: bool  # False: no ticket, the KV stays only as prefix cache
    hint: PrefixHint | None = None  # where the beginning may be pulled from
    embeddings: tuple[EmbeddingTicket, ...] = ()  # one for each item of `generation.media`


class Decode(Command, frozen=True):
    """Generate. With a ticket: pull its KV first (WAITING_REMOTE_KV); without: compute here what the hint lacks."""

    id: int
    attempt: AttemptId
    generation: Generation
    ticket: KvTicket | None = None
    hint: PrefixHint | None = None  # only without a ticket


class Abort(Command, frozen=True):
    """Forget the request and free what it holds. Idempotent; answered by nothing."""

    id: int
    reason: str
    choices: tuple[int, ...] = ()  # a Decode's: only these, while others go on


class Resume(Command, frozen=True):
    """The answer to HandoffLost: recompute what is missing here and go on after the committed tokens."""

    id: int
    choices: tuple[ChoiceState, ...]


class HandoffReady(Command, frozen=True):
    """The source sealed this many blocks (cumulative), one number per KV group, and digested some of them."""

    id: int
    num_blocks: tuple[int, ...]
    digests: tuple[BlockDigest, ...] = ()


class HandoffComplete(Command, frozen=True):
    id: int
    first_tokens: tuple[FirstToken, ...]
    partial: tuple[GroupBlocks, ...]


class HandoffFailed(Command, frozen=True):
    """Follow ended with an error or was lost."""

    id: int
    error: ErrorInfo


class FollowAttach(Command, frozen=True):
    follow: int
    ticket: KvTicket


class FollowBeat(Command, frozen=True):
    follow: int


class FollowLost(Command, frozen=True):
    """The transport of a Follow ended without Release."""

    follow: int


class FollowRelease(Command, frozen=True):
    follow: int
    reason: ReleaseReason


class ReleaseTicket(Command, frozen=True):
    """Release by RPC or by the router; answered by Released."""

    call: int
    ticket: Ticket


class PrefillStreamClosed(Command, frozen=True):
    """The router's stream that held this request's ticket is gone for good: free it unless it is followed."""

    id: int


class ConnectPeer(Command, frozen=True):
    peer: PeerInfo


class DisconnectPeer(Command, frozen=True):
    peer_id: str


class Export(Command, frozen=True):
    """Copy these blocks into a staging slot; answered by Exported."""

    export: int
    ticket: Ticket
    group: int
    blocks: tuple[int, ...]
    slot: int


class FetchedPiece(Command, frozen=True):
    """Blocks [first, first + len(words)) of a read lie in a staging slot; words were read at the source after
    the copy. The engine answers SlotFree when it has copied them out."""

    read: int
    first: int
    slot: int
    words: tuple[int, ...]


class FetchEnded(Command, frozen=True):
    """The socket half of a read is over; without an error every piece was delivered before."""

    read: int
    error: ErrorInfo | None = None


class GetLoad(Command, frozen=True):
    """Answered by LoadReply; `check_integrity` raises inside the engine if a count is inconsistent."""

    call: int
    check_integrity: bool = False


class Drain(Command, frozen=True):
    """Refuse new requests from now on."""


class Shutdown(Command, frozen=True):
    pass


EngineCommand = (
    Prefill | Decode | Abort | Resume | HandoffReady | HandoffComplete | HandoffFailed | FollowAttach | FollowBeat
    | FollowLost | FollowRelease | ReleaseTicket | PrefillStreamClosed | ConnectPeer | DisconnectPeer | Export
    | FetchedPiece | FetchEnded | LookupPrefix | PrefixFound | EncodeItem | EmbeddingSourceFailed | EmbeddingChecked
    | GetLoad | Drain | Shutdown
)  # fmt: skip

# --------------------------------------------------------------------------------------------- events


class Queued(Event, frozen=True):
    id: int
    eta_s: float


class Accepted(Event, frozen=True):
    """The prompt's blocks are reserved and its first chunk is about to run."""

    id: int
    ticket: KvTicket | None
    cached_tokens: int


class PrefillFinished(Event, frozen=True):
    id: int
    first_tokens: tuple[FirstToken, ...]
    usage: Usage
    queue_s: float
    compute_s: float


class RequestFailed(Event, frozen=True):
    """The request is over and holds nothing any more."""

    id: int
    error: ErrorInfo


class HandoffDone(Event, frozen=True):
    """All KV is here and verified; decoding begins."""

    id: int
    timing: HandoffTiming


class HandoffLost(Event, frozen=True):
    """The hand-off cannot complete. The request waits for Resume or Abort."""

    id: int
    verified_blocks: int
    verified_tokens: int
    error: ErrorInfo


class HandedBack(Event, frozen=True):
    """Preempted, and too long to recompute here. The request is over; place it anew."""

    id: int
    error: ErrorInfo


class HandoffRelease(Event, frozen=True):
    """The reader is through with the source: end the Follow stream with this reason."""

    id: int
    reason: ReleaseReason


class StepTokens(Event, frozen=True):
    """The tokens of one engine step, as columns. `logprobs` is empty or has one entry per row."""

    ids: tuple[int, ...]
    choices: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()


class ChoiceFinished(Event, frozen=True):
    """A choice of a decode request ended; after the last one the request is over."""

    id: int
    choice: int
    reason: FinishReason
    num_tokens: int
    stop_token_id: int | None = None


class FollowAttached(Event, frozen=True):
    follow: int
    lease: LeaseTerms


class FollowReady(Event, frozen=True):
    """As HandoffReady; `digests` are all so far."""

    follow: int
    num_blocks: tuple[int, ...]
    digests: tuple[BlockDigest, ...] = ()


class FollowComplete(Event, frozen=True):
    follow: int
    first_tokens: tuple[FirstToken, ...]
    partial: tuple[GroupBlocks, ...]


class FollowFailed(Event, frozen=True):
    follow: int
    error: ErrorInfo


class Released(Event, frozen=True):
    call: int
    released: bool
    error: ErrorInfo | None = None


class PeerConnected(Event, frozen=True):
    peer_id: str
    connector: str
    gb_per_s: float
    latency_s: float = 0.0  # 0.0: not measured


class PeerFailed(Event, frozen=True):
    peer_id: str
    error: ErrorInfo


class Fetch(Event, frozen=True):
    """The grpc connector asks the service to do the socket half of a read."""

    read: int
    peer_id: str
    ticket: Ticket
    group: int
    blocks: tuple[int, ...]


class FetchAbort(Event, frozen=True):
    read: int


class Exported(Event, frozen=True):
    """`words` were read after the last byte was copied into the slot."""

    export: int
    words: tuple[int, ...]
    error: ErrorInfo | None = None


class SlotFree(Event, frozen=True):
    slot: int


class Beat(Event, frozen=True):
    """Sent by the engine loop about every 0.5 s: the proof that it is not hung. `pulled` maps the id of each
    hand-off in progress to its blocks pulled so far. With `is_draining` it was sent after Drain was seen, and all
    commands before it: at once, and from then on every 0.05 s, because the service waits for what is left."""

    load: Load
    pulled: dict[int, int]
    is_draining: bool = False


class LoadReply(Event, frozen=True):
    call: int
    load: Load
    error: ErrorInfo | None = None


EngineEvent = (
    Started | StartFailed | Queued | Accepted | PrefillFinished | RequestFailed | HandoffDone | HandoffLost
    | HandedBack | HandoffRelease | StepTokens | ChoiceFinished | FollowAttached | FollowReady | FollowComplete
    | FollowFailed | Released | PeerConnected | PeerFailed | Fetch | FetchAbort | Exported | PrefixTicket
    | PrefixWanted | PrefixPulled | ItemEncoded | EmbeddingRelease | EmbeddingCheck | SlotFree | Beat | LoadReply
    | Pulse
)  # fmt: skip
