"""CPU of the router per streamed token, over workers that compute nothing; see bench/README.md.

scripts/bench router_cpu                     64 streams of 128 tokens, a step of all streams each 10 ms
scripts/bench router_cpu --streams 256 --step-ms 25
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "support")]

from checkpoint_tokenizer import write_tokenizer  # noqa: E402
from fake_worker import VOCAB_SIZE, DecodeCall, FakeDecode, FakePrefill, prefill_well  # noqa: E402
from measured import print_table, provenance, write_result  # noqa: E402
from processes import cpu_seconds  # noqa: E402

from kvrelay_client import AsyncClient  # noqa: E402

PROMPT_TOKENS = 32
WARM_TOKENS = 8
ROUTER = """
import sys, uvloop
from kvrelay_router.config import RouterConfig
from kvrelay_router.main import serve
model, prefill, decode = sys.argv[1:]
sys.exit(uvloop.run(serve(RouterConfig(model=model, prefill=[prefill], decode=[decode]))))
"""


class PacedDecode:
    """A decode worker that gives every stream its next token at each step."""

    def __init__(self, step_s: float) -> None:
        self.worker = FakeDecode("decode-0", self._begin)
        self._step_s = step_s
        self._running: dict[DecodeCall, int] = {}  # next position

    async def _begin(self, call: DecodeCall) -> None:
        call.accept()
        self._running[call] = 0

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s += self._step_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if not self._running:
                continue
            self.worker.step(self._running)
            for call in list(self._running):
                self._running[call] += 1
                if self._running[call] == call.generation.sampling.max_tokens:
                    call.end(self._running.pop(call))


def main() -> int:
    args = parse_args()
    rows = {}
    for name, has_text in (("token ids", False), ("token ids and text", True)):
        rows[name] = asyncio.run(measure(args, has_text))
    settings = {"streams": args.streams, "tokens": args.tokens, "step_ms": args.step_ms}
    result = {"provenance": provenance(), "settings": settings, "answers": rows}
    header = ("answers of", "CPU per token, us", "CPU, share of a core", "tokens/s")
    print_table(header, [(name, *(f"{value:.4g}" for value in row.values())) for name, row in rows.items()])
    if args.write:
        print(f"\nwritten to {write_result('router_cpu', result).relative_to(ROOT)}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--write", action="store_true", help="write the result into bench/results, too")
    return parser.parse_args()


async def measure(args: argparse.Namespace, has_text: bool) -> dict[str, float]:
    """Of streams that begin together; the router's start and its first requests are not counted."""
    decode = PacedDecode(args.step_ms / 1e3)
    prefill = FakePrefill("prefill-0", prefill_well)
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        write_checkpoint(Path(folder), has_text)
        await prefill.start()
        await decode.worker.start()
        pacing = asyncio.create_task(decode.run())
        async with router(folder, prefill.address, decode.worker.address) as (pid, address):
            async with AsyncClient(address) as client:
                await stream_all(client, args.streams, WARM_TOKENS)
                before_s, started_s = cpu_seconds(pid), time.perf_counter()
                num_tokens = await stream_all(client, args.streams, args.tokens)
                wall_s, used_s = time.perf_counter() - started_s, cpu_seconds(pid) - before_s
        pacing.cancel()
        await asyncio.gather(pacing, return_exceptions=True)
        await decode.worker.stop()
        await prefill.stop()
    return {
        "us_per_token": 1e6 * used_s / num_tokens,
        "core_share": used_s / wall_s,
        "tokens_per_s": num_tokens / wall_s,
    }


def write_checkpoint(folder: Path, has_text: bool) -> None:
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    if has_text:
        write_tokenizer(folder, VOCAB_SIZE, adds_begin_of_text=False)


@contextlib.asynccontextmanager
async def router(model: str, prefill: str, decode: str) -> AsyncIterator[tuple[int, str]]:
    """Its process id and its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ROUTER, model, prefill, decode), stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        yield process.pid, line.strip().removeprefix("ready grpc=")
    finally:
        process.terminate()
        await process.wait()


async def stream_all(client: AsyncClient, num_streams: int, max_tokens: int) -> int:
    async def one(number: int) -> int:
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0}
        return len((await client.complete(token_ids=[number % 256] * PROMPT_TOKENS, **options)).token_ids)

    return sum(await asyncio.gather(*map(one, range(num_streams))))


if __name__ == "__main__":
    sys.exit(main())
