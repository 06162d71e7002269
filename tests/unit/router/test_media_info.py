"""What the front door tells clients about images."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_relay import RelayMaker
from image_relay import PAD
from media_checkpoints import write_qwen

from kvrelay_client import MediaInfo
from kvrelay_core.media.limits import MediaLimits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_qwen(folder)
    return folder


async def test_clients_are_told_what_they_may_send(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1, media_limits=MediaLimits(max_items=3, max_pixels=1000))
    info = await relay.client.model_info()
    assert info.media == MediaInfo(
        formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"), max_items=3, max_item_bytes=20 << 20, max_pixels=1000,
        max_message_bytes=32 << 20, fetches_urls=False, placeholder_token_id=PAD, max_video_frames=0,
        max_video_pixels=0, video_placeholder_token_id=0,
    )  # fmt: skip
    assert not info.no_media


async def test_clients_are_told_why_images_are_refused(make_relay: RelayMaker) -> None:
    info = await (await make_relay()).client.model_info()
    assert info.media is None and "start one, and the router with --encoder" in info.no_media
