"""Clients of a KVRelay router: `AsyncClient` for asyncio, `Client` for threads. No torch."""

from kvrelay_client.async_client import AsyncClient, GenerateStream
from kvrelay_client.client import BlockingGenerateStream, Client
from kvrelay_client.requests import GenerateOptions, SamplingOptions
from kvrelay_client.responses import Completion, Delta, Finish, MediaInfo, ModelInfo, Timing
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.rpc.channel import TlsFiles

__all__ = [
    "AsyncClient",
    "BlockingGenerateStream",
    "Client",
    "Completion",
    "Delta",
    "Finish",
    "GenerateOptions",
    "GenerateStream",
    "MediaInfo",
    "ModelInfo",
    "SamplingOptions",
    "Timing",
    "TlsFiles",
    "VideoFrames",
]
