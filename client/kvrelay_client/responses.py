"""What a client gets back: plain data, made from the wire's messages. No gRPC here beyond the generated messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import InternalError
from kvrelay_core.request import FinishReason, HandoffTiming, TokenLogprobs, Usage
from kvrelay_core.rpc import wire


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a choice. Text may come later than its tokens; `logprobs` is empty or as long as `token_ids`."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, as the router saw them. `handoff` is None when no KV had to be handed over."""

    queue_s: float
    ttft_s: float
    total_s: float
    inter_token_mean_s: float
    inter_token_max_s: float
    attempts: int
    prefill_worker: str
    decode_worker: str
    handoff: HandoffTiming | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event of a choice. `stop_reason`: the stop string or token that ended it, when one did."""

    index: int
    reason: FinishReason
    usage: Usage
    timing: Timing
    stop_reason: str = ""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a request may bring, if the model takes images."""

    formats: tuple[str, ...]
    max_items: int
    max_item_bytes: int
    max_pixels: int  # of one image
    max_message_bytes: int  # of a whole request
    fetches_urls: bool  # others than data: URLs, of some hosts
    placeholder_token_id: int
    max_video_frames: int  # 0: no videos are taken
    max_video_pixels: int  # of all its frames
    video_placeholder_token_id: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    accepts_text: bool
    accepts_messages: bool
    fingerprint: bytes
    media: MediaInfo | None = None  # None: images are refused
    no_media: str = ""  # why, and what to do about it


@dataclass(slots=True)
class Completion:
    """All of one choice."""

    index: int
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    stop_reason: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def event_from_wire(response: pb.GenerateResponse) -> Delta | Finish | None:
    """None for an event of a later release."""
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            logprobs = tuple(map(wire.logprobs_from_wire, delta.logprobs))
            return Delta(delta.index, tuple(delta.token_ids), delta.text, logprobs)
        case "finish":
            return _finish_from_wire(response.finish)
        case _:
            return None


def model_info_from_wire(info: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model=info.model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        accepts_text=info.accepts_text,
        accepts_messages=info.accepts_messages,
        fingerprint=info.model_fingerprint,
        media=_media_info_from_wire(info.media) if info.HasField("media") else None,
        no_media=info.no_media,
    )


def _media_info_from_wire(media: pb.MediaInfo) -> MediaInfo:
    return MediaInfo(
        formats=tuple(media.formats),
        max_items=media.max_items,
        max_item_bytes=media.max_item_bytes,
        max_pixels=media.max_pixels,
        max_message_bytes=media.max_message_bytes,
        fetches_urls=media.fetches_urls,
        placeholder_token_id=media.placeholder_token_id,
        max_video_frames=media.max_video_frames,
        max_video_pixels=media.max_video_pixels,
        video_placeholder_token_id=media.video_placeholder_token_id,
    )


def collect(events: Iterable[Delta | Finish]) -> list[Completion]:
    """The choices of a whole stream, by index. Raises InternalError when one of them has no end."""
    deltas: dict[int, list[Delta]] = {}
    finishes: dict[int, Finish] = {}
    for event in events:
        if isinstance(event, Delta):
            deltas.setdefault(event.index, []).append(event)
        else:
            finishes[event.index] = event
    if not finishes or deltas.keys() - finishes.keys():
        raise InternalError("the stream ended before every choice had finished; the server is of another release?")
    return [_completion(finishes[index], deltas.get(index, [])) for index in sorted(finishes)]


def _completion(finish: Finish, deltas: list[Delta]) -> Completion:
    return Completion(
        index=finish.index,
        finish_reason=finish.reason,
        usage=finish.usage,
        timing=finish.timing,
        stop_reason=finish.stop_reason,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
    )


def _finish_from_wire(finish: pb.Finish) -> Finish:
    timing = finish.timing
    return Finish(
        index=finish.index,
        reason=wire.finish_reason_from_wire(finish.reason) or FinishReason.ERROR,
        usage=wire.usage_from_wire(finish.usage),
        timing=Timing(
            queue_s=timing.queue_s,
            ttft_s=timing.ttft_s,
            total_s=timing.total_s,
            inter_token_mean_s=timing.inter_token_mean_s,
            inter_token_max_s=timing.inter_token_max_s,
            attempts=timing.attempts,
            prefill_worker=timing.prefill_worker,
            decode_worker=timing.decode_worker,
            handoff=wire.handoff_timing_from_wire(timing.handoff) if timing.HasField("handoff") else None,
        ),
        stop_reason=finish.stop_reason,
    )
