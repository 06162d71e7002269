"""Between the messages of common.proto and the dataclasses of `kvrelay_core.request`.

`x_to_wire` makes the message, `x_from_wire` the dataclass. Input from the wire is checked for shape only
(InvalidRequestError); whether values make sense is the router's and the engine's business.
"""

from __future__ import annotations

from kvrelay.v1 import common_pb2 as pb
from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.references import check_references
from kvrelay_core.media.video import MediaContent, VideoFrames
from kvrelay_core.request import (
    NO_SLO,
    AttemptId,
    ChoiceState,
    FinishReason,
    FirstToken,
    Generation,
    HandoffTiming,
    MediaReference,
    PrefixHint,
    SamplingParams,
    Slo,
    TokenLogprobs,
    Usage,
)

_REASON_TO_WIRE: dict[FinishReason | None, pb.FinishReason.ValueType] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_REASON_FROM_WIRE = {int(wire): reason for reason, wire in _REASON_TO_WIRE.items()}


def finish_reason_to_wire(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    return _REASON_TO_WIRE[reason]


def finish_reason_from_wire(wire: int) -> FinishReason | None:
    """Reasons of a later release are an error to this one."""
    return _REASON_FROM_WIRE.get(wire, FinishReason.ERROR)


def attempt_to_wire(attempt: AttemptId) -> pb.AttemptId:
    return pb.AttemptId(router_id=attempt.router_id, request_id=attempt.request_id, attempt=attempt.attempt)


def attempt_from_wire(wire: pb.AttemptId) -> AttemptId:
    if not wire.request_id:
        raise InvalidRequestError("attempt.request_id is empty; every request between services needs one")
    return AttemptId(wire.router_id, wire.request_id, wire.attempt)


def sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        logit_bias=sampling.logit_bias,
    )


def sampling_from_wire(wire: pb.SamplingParams) -> SamplingParams:
    """The resolved parameters of a request between services; fields left out take the neutral value."""
    neutral = SamplingParams()
    return SamplingParams(
        temperature=wire.temperature if wire.HasField("temperature") else neutral.temperature,
        top_p=wire.top_p if wire.HasField("top_p") else neutral.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty
        if wire.HasField("repetition_penalty")
        else neutral.repetition_penalty,
        frequency_penalty=wire.frequency_penalty,
        presence_penalty=wire.presence_penalty,
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else neutral.max_tokens,
        min_tokens=wire.min_tokens,
        stop_token_ids=tuple(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs if wire.HasField("logprobs") else None,
        logit_bias=dict(wire.logit_bias),
    )


def choice_state_to_wire(choice: ChoiceState) -> pb.ChoiceState:
    return pb.ChoiceState(index=choice.index, committed_token_ids=choice.committed)


def choice_state_from_wire(wire: pb.ChoiceState) -> ChoiceState:
    return ChoiceState(wire.index, tuple(wire.committed_token_ids))


def slo_to_wire(slo: Slo) -> pb.SloParams | None:
    """None where nothing was promised."""
    if slo == NO_SLO:
        return None
    return pb.SloParams(ttft_ms=_to_ms(slo.ttft_s), itl_ms=_to_ms(slo.itl_s))


def slo_from_wire(wire: pb.SloParams) -> Slo:
    ttft_s = wire.ttft_ms / 1e3 if wire.HasField("ttft_ms") else None
    return Slo(ttft_s, wire.itl_ms / 1e3 if wire.HasField("itl_ms") else None)


def _to_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def media_reference_to_wire(reference: MediaReference) -> pb.MediaReference:
    """Without a ticket: the embedding's whereabouts are no part of what a request is."""
    t, h, w = reference.grid
    return pb.MediaReference(
        content_hash=reference.content_hash,
        offset=reference.offset,
        num_tokens=reference.num_tokens,
        grid=pb.MediaGrid(t=t, h=h, w=w) if any(reference.grid) else None,
        first_row=reference.first_row,
        seconds_per_grid=reference.seconds_per_grid,
    )


def media_reference_from_wire(wire: pb.MediaReference) -> MediaReference:
    grid = (wire.grid.t, wire.grid.h, wire.grid.w)
    return MediaReference(wire.content_hash, wire.offset, wire.num_tokens, grid, wire.first_row, wire.seconds_per_grid)


def media_content_to_wire(content: MediaContent, mime_type: str = "") -> pb.MediaItem:
    if isinstance(content, VideoFrames):
        return pb.MediaItem(mime_type=mime_type, video=pb.VideoFrames(frames=content.frames, fps=content.fps))
    return pb.MediaItem(mime_type=mime_type, data=content)


def video_from_wire(wire: pb.VideoFrames) -> VideoFrames:
    return VideoFrames(tuple(wire.frames), wire.fps)


def generation_to_wire(generation: Generation) -> pb.Generation:
    return pb.Generation(
        prompt_token_ids=generation.prompt,
        sampling=sampling_to_wire(generation.sampling),
        seed=generation.seed,
        eos_token_ids=generation.eos_token_ids,
        choices=map(choice_state_to_wire, generation.choices),
        cache_salt=generation.cache_salt,
        priority=generation.priority,
        deadline_s=generation.deadline_s,
        slo=slo_to_wire(generation.slo),
        media=map(media_reference_to_wire, generation.media),
    )


def generation_from_wire(wire: pb.Generation) -> Generation:
    choices = tuple(map(choice_state_from_wire, wire.choices)) or (ChoiceState(0),)
    if not wire.prompt_token_ids:
        raise InvalidRequestError("prompt_token_ids is empty; send at least one token")
    if len(choices) > 1 and any(choice.committed for choice in choices):
        raise InvalidRequestError("several choices with committed tokens; send one request per choice")
    if len({choice.index for choice in choices}) != len(choices):
        raise InvalidRequestError("choices repeat an index; number them apart")
    media = tuple(map(media_reference_from_wire, wire.media))
    check_references(media, len(wire.prompt_token_ids))
    return Generation(
        prompt=tuple(wire.prompt_token_ids),
        sampling=sampling_from_wire(wire.sampling),
        seed=wire.seed,
        choices=choices,
        eos_token_ids=tuple(wire.eos_token_ids),
        cache_salt=wire.cache_salt,
        priority=wire.priority,
        deadline_s=wire.deadline_s if wire.HasField("deadline_s") else None,
        slo=slo_from_wire(wire.slo),
        media=media,
    )


def logprobs_to_wire(logprobs: TokenLogprobs | None) -> pb.TokenLogprobs | None:
    if logprobs is None:
        return None
    top = [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return pb.TokenLogprobs(logprob=logprobs.logprob, top=top)


def logprobs_from_wire(wire: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(wire.logprob, tuple((entry.token_id, entry.logprob) for entry in wire.top))


def first_token_to_wire(token: FirstToken) -> pb.FirstToken:
    return pb.FirstToken(
        choice=token.choice,
        position=token.position,
        token_id=token.token_id,
        logprobs=logprobs_to_wire(token.logprobs),
        finish_reason=finish_reason_to_wire(token.finish_reason),
    )


def first_token_from_wire(wire: pb.FirstToken) -> FirstToken:
    return FirstToken(
        choice=wire.choice,
        position=wire.position,
        token_id=wire.token_id,
        logprobs=logprobs_from_wire(wire.logprobs) if wire.HasField("logprobs") else None,
        finish_reason=finish_reason_from_wire(wire.finish_reason),
    )


def usage_to_wire(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def usage_from_wire(wire: pb.Usage) -> Usage:
    return Usage(wire.prompt_tokens, wire.cached_tokens, wire.completion_tokens)


def prefix_hint_to_wire(hint: PrefixHint) -> pb.PrefixHint:
    return pb.PrefixHint(source=pb.WorkerRef(address=hint.source_address), num_tokens=hint.num_tokens)


def prefix_hint_from_wire(wire: pb.PrefixHint) -> PrefixHint:
    return PrefixHint(wire.source.address, wire.num_tokens)


def handoff_timing_to_wire(timing: HandoffTiming) -> pb.HandoffTiming:
    return pb.HandoffTiming(
        bytes=timing.size_bytes,
        seconds=timing.seconds,
        blocks_pulled=timing.blocks_pulled,
        blocks_reused=timing.blocks_reused,
        connector=timing.connector,
    )


def handoff_timing_from_wire(wire: pb.HandoffTiming) -> HandoffTiming:
    return HandoffTiming(wire.bytes, wire.seconds, wire.blocks_pulled, wire.blocks_reused, wire.connector)
