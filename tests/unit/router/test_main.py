"""The router as a process: its ready line, its signals, its exit codes."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from fake_worker import FakeDecode, FakePrefill, decode_well, prefill_well

from kvrelay_client import AsyncClient
from kvrelay_core.errors import ConfigError
from kvrelay_router.config import RouterConfig
from kvrelay_router.main import serve

PROGRAM = """
import asyncio, sys
from kvrelay_router.config import RouterConfig
from kvrelay_router.main import serve
model, prefill, decode = sys.argv[1:]
sys.exit(asyncio.run(serve(RouterConfig(model=model, prefill=[prefill], decode=[decode]))))
"""


async def test_it_says_when_it_is_ready_and_drains_on_sigterm(checkpoint: Path) -> None:
    prefill, decode = FakePrefill("p", prefill_well), FakeDecode("d")
    await prefill.start()
    await decode.start()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(checkpoint), prefill.address, decode.address),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        assert line.startswith("ready grpc=127.0.0.1:")
        async with AsyncClient(line.removeprefix("ready grpc=").strip()) as client:
            running = asyncio.ensure_future(client.complete(token_ids=[1], max_tokens=3))
            call = await decode.next_call()
            process.send_signal(signal.SIGTERM)
            await decode_well(call)
            assert len((await running).token_ids) == 3
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await prefill.stop()
        await decode.stop()


async def test_a_model_that_is_not_there_is_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = RouterConfig(model=str(tmp_path), prefill=["127.0.0.1:1"], decode=["127.0.0.1:2"])
    assert await serve(config) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decode": []}, "no decode worker"),
        ({"prefill": ["nowhere"]}, "is not HOST:PORT"),
        ({"placement_wait_s": -1}, "placement_wait_s"),
        ({"decode": ["localhost"]}, "is not HOST:PORT"),
        ({"decode": ["127.0.0.1:1"]}, "listed twice"),
        ({"port": 70000}, "between 0 and 65535"),
        ({"model": ""}, "model must not be empty"),
        ({"drain_s": -1}, "drain_s"),
        ({"slow_client_s": 0}, "slow_client_s"),
    ],
)
def test_configurations_that_cannot_work(change: dict[str, object], words: str) -> None:
    fields: dict[str, object] = {"model": "m", "prefill": ["127.0.0.1:1"], "decode": ["127.0.0.1:2"], **change}
    with pytest.raises(ConfigError, match=words):
        RouterConfig(**fields).validate()  # type: ignore[arg-type]
