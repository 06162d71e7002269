"""Images by URL: fetched only where hosts are listed, each once, and counted as the bytes of the request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from media_checkpoints import encode_image, write_qwen

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.common_pb2 import MediaItem
from kvrelay_core.errors import ConfigError, InvalidRequestError, OverloadedError, UnavailableError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.url_fetch import UrlFetcher
from kvrelay_router.config import RouterConfig
from kvrelay_router.inference import make_fetcher
from kvrelay_router.main import load_checkpoint
from kvrelay_router.media_input import MediaBudget, read_media
from kvrelay_router.prompt import PromptReader

PICTURE = encode_image(100, 80)
OTHER = encode_image(200, 40)
LIMITS = MediaLimits(max_items=4)


class FakeFetcher:
    """Knows some URLs; all others fail."""

    def __init__(self, **pages: bytes) -> None:
        self.pages = {f"https://pics.test/{name}": data for name, data in pages.items()}
        self.fetched: list[str] = []
        self.cancelled: list[str] = []

    async def fetch(self, url: str, on_bytes: Callable[[int], None]) -> bytes:
        self.fetched.append(url)
        if url.endswith("/never"):
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.append(url)
        if url not in self.pages:
            raise UnavailableError("gone")
        on_bytes(len(self.pages[url]))
        return self.pages[url]


def by_url(name: str) -> MediaItem:
    return MediaItem(url=f"https://pics.test/{name}")


async def test_a_prompt_with_urls_is_that_with_the_bytes(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    fetcher = FakeFetcher(a=PICTURE, b=OTHER)
    reader = PromptReader(checkpoint.tokenizer, checkpoint.processor, LIMITS, fetcher)
    text = "<|image_pad|>" * 4
    told: list[int] = []
    media = [by_url("a"), MediaItem(data=PICTURE), by_url("b"), by_url("a")]
    prompt = await reader.read(pb.GenerateRequest(text=text, media=media), 10**6, b"tower", told.append)
    same = [MediaItem(data=data) for data in (PICTURE, PICTURE, OTHER, PICTURE)]
    expected = await reader.read(pb.GenerateRequest(text=text, media=same), 10**6, b"tower")
    assert prompt == expected
    assert [item.content_hash for item in prompt.items] == [
        media_hash(data, b"tower") for data in (PICTURE, PICTURE, OTHER, PICTURE)
    ]
    assert sorted(fetcher.fetched) == sorted(fetcher.pages), "each once"
    assert sum(told) == len(PICTURE) + len(OTHER)


async def test_without_a_fetcher_nothing_is_fetched() -> None:
    with pytest.raises(UnsupportedError, match="fetching of URLs is off"):
        await read_media([by_url("a")], LIMITS, b"tower")


async def test_the_first_failure_ends_the_other_fetches() -> None:
    fetcher = FakeFetcher()
    with pytest.raises(UnavailableError, match="gone"):
        await read_media([by_url("never"), by_url("missing")], LIMITS, b"tower", fetcher)
    assert fetcher.cancelled == ["https://pics.test/never"]


async def test_what_was_fetched_is_checked_as_if_it_had_been_sent() -> None:
    with pytest.raises(InvalidRequestError, match="not an image"):
        await read_media([by_url("page")], LIMITS, b"tower", FakeFetcher(page=b"<html>no picture</html>"))


async def test_too_many_urls_are_not_even_tried() -> None:
    fetcher = FakeFetcher(a=PICTURE)
    with pytest.raises(InvalidRequestError, match="5 items; allowed: 4"):
        await read_media([by_url("a")] * 5, LIMITS, b"tower", fetcher)
    assert not fetcher.fetched


async def test_fetched_bytes_count_for_as_long_as_the_request_runs() -> None:
    budget = MediaBudget(1000)
    request = pb.GenerateRequest(media=[MediaItem(data=bytes(400))])
    with budget.hold(request) as take:
        take(500)
        with pytest.raises(OverloadedError, match="1000 are allowed"):
            take(200)
        with pytest.raises(OverloadedError, match="1000 are allowed"), budget.hold(request):
            raise AssertionError("there was room")
    with budget.hold(request) as take:
        take(590)


def config_with(*hosts: str) -> RouterConfig:
    return RouterConfig(model="m", prefill=["h:1"], decode=["h:2"], media_url_hosts=list(hosts))


def test_a_router_fetches_only_where_hosts_are_listed() -> None:
    assert make_fetcher(config_with()) is None
    assert isinstance(make_fetcher(config_with("pics.test")), UrlFetcher)
    with pytest.raises(ConfigError, match="media_url_hosts"):
        config_with("https://pics.test/").validate()


def test_without_the_extra_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvrelay_core.media.url_fetch", None)
    assert make_fetcher(config_with()) is None
    with pytest.raises(ConfigError, match=r"kvrelay\[media-url\]"):
        make_fetcher(config_with("pics.test"))
