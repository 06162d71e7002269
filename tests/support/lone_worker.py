"""One worker outside any cluster: `kvrelay serve decode`, which may dial every source on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from cluster import HELD, START_DEADLINE_S, STOP_DEADLINE_S, wait_until

from kvrelay.v1 import worker_pb2 as pb
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub


@contextmanager
def lone_decode(model_dir: Path, *, block_tokens: int) -> Iterator[str]:
    """Its address. Leaving the block asserts that it holds nothing and ends cleanly."""
    with tempfile.TemporaryDirectory(prefix="kvl-", dir="/tmp") as folder:
        words = ["--model", str(model_dir), "--block-tokens", str(block_tokens)]
        words += ["--threads-per-worker", "1", "--kv-blocks", "64", "--worker-id", "lone", "--run-dir", f"{folder}/run"]
        log_path, stdout_path = Path(folder, "log"), Path(folder, "stdout")
        with log_path.open("w") as log, stdout_path.open("w") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvrelay_cli", "serve", "decode", *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            )
        try:
            wait_until(lambda: stdout_path.read_text().endswith("\n"), START_DEADLINE_S, log_path.read_text)
            address = stdout_path.read_text().strip().removeprefix("ready grpc=")
            yield address
            wait_until(lambda: not held(address), 2, lambda: f"nothing held: {held(address)}")
            process.terminate()
            assert process.wait(STOP_DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait(STOP_DEADLINE_S)


def held(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        stream = WorkerServiceStub(channel).WatchLoad(pb.WatchLoadRequest(interval_s=0), timeout=10)
        [load] = stream
    return [f"{getattr(load, name)} {name}" for name in HELD if getattr(load, name)]
