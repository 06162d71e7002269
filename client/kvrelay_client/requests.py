"""Builds a GenerateRequest from keyword arguments. Values are checked by the server; here only their kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from kvrelay.v1 import common_pb2, inference_pb2
from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.rpc.channel import MAX_MESSAGE_BYTES
from kvrelay_core.rpc.wire import media_content_to_wire


class SamplingOptions(TypedDict, total=False):
    """What is left out takes the default of the model, see its generation_config.json."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    seed: int
    n: int
    logprobs: int
    logit_bias: Mapping[int, float]


Media = bytes | str | VideoFrames  # an image file's bytes, an image's URL, or frames of a video that were sampled

# {"role": ..., "content": a text, or a sequence of content parts}; a part is a mapping as `_part` takes it.
Message = Mapping[str, Any]


class GenerateOptions(SamplingOptions, total=False):
    model: str
    request_id: str
    session_id: str
    cache_salt: str
    priority: int
    ttft_ms: float
    itl_ms: float
    media: Sequence[Media]  # of a prompt or token ids, in order
    placeholders: Sequence[tuple[int, int]]  # of token ids: offset and length of each run that is the media's


def build_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Message] | None,
    options: GenerateOptions,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> inference_pb2.GenerateRequest:
    """Exactly one of the first three is given. Raises InvalidRequestError."""
    if sum(given is not None for given in (prompt, token_ids, messages)) != 1:
        raise InvalidRequestError("give exactly one of prompt, token_ids, messages", field="prompt")
    envelope: dict[str, Any] = dict(options)
    unknown = envelope.keys() - GenerateOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()
    if unknown:
        raise InvalidRequestError(f"unknown option {sorted(unknown)[0]!r}", field=sorted(unknown)[0])
    sampling = {name: envelope.pop(name) for name in SamplingOptions.__annotations__ if name in envelope}
    media = envelope.pop("media", ())
    placeholders = envelope.pop("placeholders", None)
    slo = {name: envelope.pop(name) for name in ("ttft_ms", "itl_ms") if name in envelope}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    try:
        request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**sampling), **envelope)
        if slo:
            request.slo.CopyFrom(common_pb2.SloParams(**slo))
        request.media.extend(map(_media_item, media))
        if placeholders is not None:
            request.placeholders.SetInParent()
            for offset, num_tokens in placeholders:
                request.placeholders.runs.add(offset=offset, num_tokens=num_tokens)
        _set_prompt(request, prompt, token_ids, messages)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(f"the request does not fit the wire: {error}") from error
    _check_size(request, max_bytes)
    return request


def _check_size(request: inference_pb2.GenerateRequest, max_bytes: int) -> None:
    """The transport would refuse it too, in words of its own."""
    num_bytes = request.ByteSize()
    if num_bytes <= max_bytes:
        return
    within = (part.media for message in request.messages.messages for part in message.content)
    media_bytes = sum(item.ByteSize() for item in (*request.media, *within))
    raise InvalidRequestError(
        f"the request has {num_bytes} bytes, of these {media_bytes} of media; a message may have {max_bytes}. "
        "Send fewer or smaller images, or URLs where the router fetches them",
        field="media",
    )


def _set_prompt(
    request: inference_pb2.GenerateRequest,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Message] | None,
) -> None:
    if prompt is not None:
        request.text = prompt
    elif token_ids is not None:
        request.token_ids.ids.extend(token_ids)
        request.token_ids.SetInParent()
    else:
        request.messages.SetInParent()
        for message in messages or ():
            if not {"role", "content"} <= message.keys():
                raise InvalidRequestError("each message needs a role and a content", field="messages")
            wire = request.messages.messages.add(role=message["role"])
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            wire.content.extend(map(_part, parts))


def _part(part: Mapping[str, Any]) -> inference_pb2.ContentPart:
    match part:
        case {"type": "text", "text": str() as text}:
            return inference_pb2.ContentPart(text=text)
        case {"type": "image", "image": bytes() | str() as image}:
            return inference_pb2.ContentPart(media=_media_item(image))
        case {"type": "image_url", "image_url": {"url": str() as url}}:
            return inference_pb2.ContentPart(media=_media_item(url))
        case {"type": "video", "video": list() | tuple() as frames, "fps": int() | float() as fps}:
            return inference_pb2.ContentPart(media=_media_item(VideoFrames(tuple(frames), fps)))
        case {"type": "video", "video": VideoFrames() as video}:
            return inference_pb2.ContentPart(media=_media_item(video))
    raise InvalidRequestError(
        'a content part must be {"type": "text", "text": ...}, {"type": "image", "image": bytes or URL}, '
        '{"type": "image_url", "image_url": {"url": ...}} or {"type": "video", "video": [bytes of each frame], '
        '"fps": frames a second}',
        field="messages",
    )


def _media_item(media: Media) -> common_pb2.MediaItem:
    if isinstance(media, str):
        return common_pb2.MediaItem(url=media)
    return media_content_to_wire(media)
