"""A router over fake workers, which must be clean when the test ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checkpoint_tokenizer import write_tokenizer
from fake_relay import RelayMaker
from fake_worker import VOCAB_SIZE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's small files, without weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [381, 382]}))
    write_tokenizer(folder, VOCAB_SIZE, adds_begin_of_text=True)
    return folder


@pytest.fixture
async def make_relay(checkpoint: Path) -> AsyncIterator[RelayMaker]:
    before = asyncio.all_tasks()
    maker = RelayMaker(checkpoint)
    yield maker
    await maker.close()
    # gRPC's own tasks may end a moment after their server's stop() has returned.
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=5)
    assert not left, f"tasks left: {left}"
