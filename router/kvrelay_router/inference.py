"""InferenceService: the gRPC front door. Turns a call into a checked request and a run, and streams its messages.

The handler of a call is the run's only waiter: when it ends, for whatever reason, the run is abandoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceServicer
from kvrelay_core.checkpoint import GenerationDefaults
from kvrelay_core.clock import Clock
from kvrelay_core.errors import (
    ConfigError,
    DeadlineError,
    DrainingError,
    KvRelayError,
    OverloadedError,
    RequestCancelledError,
)
from kvrelay_core.media.image_header import IMAGE_FORMATS
from kvrelay_core.media.processor_config import ProcessorConfig
from kvrelay_core.media.url_rules import UrlRules
from kvrelay_core.rpc.channel import MAX_MESSAGE_BYTES
from kvrelay_core.tracing import TRACE_PARENT, end_span, start_span, trace_parent_of
from kvrelay_router.choice_output import ChoiceOutput
from kvrelay_router.config import RouterConfig
from kvrelay_router.detokenizer import Detokenizer
from kvrelay_router.fleet import Fleet
from kvrelay_router.media_input import MediaBudget, MediaFetcher, media_items
from kvrelay_router.placement_wait import WaitTerms
from kvrelay_router.prompt import PromptReader
from kvrelay_router.request_run import RequestRun, RunIdentity
from kvrelay_router.response_stream import ResponseStream
from kvrelay_router.tokenizer import Tokenizer
from kvrelay_router.validation import CheckedRequest, RequestChecker
from kvrelay_router.write_limit import WriteLimit


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the router reads of a model."""

    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    processor: ProcessorConfig | None = None  # None: it takes no images


class InferenceServicer(InferenceServiceServicer):
    def __init__(self, config: RouterConfig, checkpoint: Checkpoint, router_id: str, fleet: Fleet, clock: Clock):
        self._config = config
        self._checkpoint = checkpoint
        self._router_id = router_id
        self._fleet = fleet
        self._clock = clock
        self._wait_terms = WaitTerms(
            absent_s=config.placement_wait_s, refused_s=config.refused_wait_s, encode_s=config.encode_s
        )
        self._no_media = why_no_media(config, checkpoint.processor)
        self._checker = RequestChecker(config.served_name, checkpoint.defaults, config.limits, self._no_media)
        self._prompts = PromptReader(
            checkpoint.tokenizer, checkpoint.processor, config.media_limits, make_fetcher(config)
        )
        self._media = MediaBudget(config.media_limits.max_bytes_in_progress)
        self._runs: set[RequestRun] = set()
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def num_calls(self) -> int:
        """Generate calls that have not ended."""
        return self._num_calls

    # -------------------------------------------------------------------------------------- calls

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self._enter()
        try:
            time_left_s = context.time_remaining()
            deadline_at_s = None if time_left_s is None else self._clock.now() + time_left_s
            with _span(context) as trace_parent, self._media.hold(request) as take_media:
                run = await self._prepare(request, deadline_at_s, trace_parent, take_media)
                with self._running(run, deadline_at_s):
                    await self._write_all(run, context)
        finally:
            self._leave()
        # Messages go out by `context.write`, which can be given a time limit; nothing is yielded.
        nothing: tuple[pb.GenerateResponse, ...] = ()
        for response in nothing:
            yield response

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelInfoResponse:
        self._checker.check_model(request.model)
        model = await self._fleet.registry.wait_model(self._config.placement_wait_s)
        return pb.GetModelInfoResponse(
            model=self._config.served_name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=self._checkpoint.defaults.eos_token_ids,
            accepts_text=self._prompts.accepts_text,
            accepts_messages=self._prompts.accepts_messages,
            model_fingerprint=model.fingerprint,
            media=self._media_info(),
            no_media=self._no_media,
        )

    def _media_info(self) -> pb.MediaInfo | None:
        limits, placeholders = self._config.media_limits, self._prompts.placeholders
        if self._no_media or placeholders is None:
            return None
        takes_videos = placeholders.video_token_id is not None
        return pb.MediaInfo(
            formats=IMAGE_FORMATS,
            max_items=limits.max_items,
            max_item_bytes=limits.max_item_bytes,
            max_pixels=limits.max_pixels,
            max_message_bytes=MAX_MESSAGE_BYTES,
            fetches_urls=self._prompts.fetches_urls,
            placeholder_token_id=placeholders.token_id,
            max_video_frames=limits.max_video_frames if takes_videos else 0,
            max_video_pixels=limits.max_video_pixels if takes_videos else 0,
            video_placeholder_token_id=placeholders.video_token_id or 0,
        )

    # -------------------------------------------------------------------------------------- drain

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for the running ones. Returns how many had to be abandoned."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            left = len(self._runs)
            for run in list(self._runs):
                run.abandon(DrainingError(f"the router stops, and the request took longer than {timeout_s:g} s"))
            return left
        return 0

    # ----------------------------------------------------------------------------------- one call

    def _enter(self) -> None:
        if self._draining:
            raise DrainingError("the router is draining; send the request elsewhere")
        limit = self._config.limits.max_concurrent
        if self._num_calls >= limit:
            raise OverloadedError(f"{limit} requests are in progress, the limit of this router; try again later")
        self._num_calls += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._num_calls -= 1
        if not self._num_calls:
            self._idle.set()

    async def _prepare(
        self,
        request: pb.GenerateRequest,
        deadline_at_s: float | None,
        trace_parent: str,
        take_media: Callable[[int], None],
    ) -> RequestRun:
        arrived_s = self._clock.now()
        self._checker.check_envelope(request)
        model = await self._fleet.registry.wait_model(self._config.placement_wait_s)
        encoder = await self._encoder_of(request)
        prompt = await self._prompts.read(request, model.max_model_len, encoder, take_media)
        checked = self._checker.complete(request, prompt, model)
        request_id = uuid.uuid4().hex
        response = ResponseStream(
            request.request_id or request_id, self._config.max_unsent_tokens, lambda error: run.abandon(error)
        )
        run = RequestRun(
            RunIdentity(self._router_id, request_id, trace_parent),
            checked,
            self._fleet,
            self._outputs(checked),
            response,
            self._clock,
            arrived_s=arrived_s,
            deadline_at_s=deadline_at_s,
            max_replacements=self._config.max_replacements,
            wait_terms=self._wait_terms,
        )
        return run

    async def _encoder_of(self, request: pb.GenerateRequest) -> bytes:
        """Fingerprint of the encoders, where the request has media for them."""
        if not media_items(request):
            return b""
        return await self._fleet.registry.wait_encoder_fingerprint(self._config.placement_wait_s)

    def _outputs(self, request: CheckedRequest) -> dict[int, ChoiceOutput]:
        tokenizer = self._checkpoint.tokenizer
        return {
            choice.index: ChoiceOutput(None if tokenizer is None else Detokenizer(tokenizer), request.stop)
            for choice in request.generation.choices
        }

    @contextlib.contextmanager
    def _running(self, run: RequestRun, deadline_at_s: float | None) -> Iterator[None]:
        """Starts the run; however this ends, the run is over then."""
        timer = None
        if deadline_at_s is not None:
            error = DeadlineError("the request's deadline has passed")
            left_s = max(0.0, deadline_at_s - self._clock.now())
            timer = asyncio.get_running_loop().call_later(left_s, run.abandon, error)
        self._runs.add(run)
        try:
            run.start()
            yield
        finally:
            if timer is not None:
                timer.cancel()
            run.abandon(RequestCancelledError("the client has cancelled the request or is gone"))
            self._runs.discard(run)

    async def _write_all(self, run: RequestRun, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            async with WriteLimit(self._config.slow_client_s) as limit:
                async for response in run.response:
                    limit.begin()
                    await context.write(response)
                    limit.end()
        except TimeoutError as error:
            slow: KvRelayError = OverloadedError(
                f"the client has not read a message for {self._config.slow_client_s:g} s; read faster"
            )
            run.abandon(slow)
            raise slow from error


def why_no_media(config: RouterConfig, processor: ProcessorConfig | None) -> str:
    """Empty when this cluster takes images."""
    if processor is None:
        return "this model takes no images, or lacks preprocessor_config.json; send text or token ids only"
    if not config.encoder:
        return "this cluster has no encoder; start one, and the router with --encoder HOST:PORT"
    if not config.prefill:
        return "images need a prefill worker; start one, and the router with --prefill HOST:PORT"
    return ""


def make_fetcher(config: RouterConfig) -> MediaFetcher | None:
    """None where no URLs are to be fetched. Raises ConfigError when the extra for it is missing."""
    if not config.media_url_hosts:
        return None
    try:
        from kvrelay_core.media.url_fetch import UrlFetcher
    except ImportError as error:
        raise ConfigError(f"--media-url-hosts needs pip install 'kvrelay[media-url]' ({error})") from error
    return UrlFetcher(
        UrlRules(tuple(config.media_url_hosts)),
        max_bytes=config.media_limits.max_item_bytes,
        timeout_s=config.media_url_s,
    )


@contextlib.contextmanager
def _span(context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[str]:
    """The request's span, a child of the client's if it sent a `traceparent`."""
    sent = dict(context.invocation_metadata() or ()).get(TRACE_PARENT, "")
    span = start_span("generate", str(sent), is_entry=True)
    error = ""
    try:
        yield trace_parent_of(span)
    except BaseException as failure:
        error = type(failure).__name__
        raise
    finally:
        end_span(span, error)
