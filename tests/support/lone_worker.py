"""Roles outside of `kvrelay up`: each a `kvrelay serve` process with flags of its own, as on several machines."""

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

WORKER_FLAGS = {"threads_per_worker": 1, "kv_blocks": 64}


@contextmanager
def serve(role: str, **flags: object) -> Iterator[str]:
    """Its address. Leaving the block asserts that it ends cleanly, a worker holding nothing."""
    with tempfile.TemporaryDirectory(prefix="kvl-", dir="/tmp") as folder:
        words = ["serve", role]
        if role != "router":
            flags = {"run_dir": f"{folder}/run", "worker_id": f"lone-{role}", **WORKER_FLAGS, **flags}
        for name, value in flags.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        log_path, stdout_path = Path(folder, "log"), Path(folder, "stdout")
        with log_path.open("w") as log, stdout_path.open("w") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvrelay_cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            )
        try:
            wait_until(lambda: stdout_path.read_text().endswith("\n"), START_DEADLINE_S, log_path.read_text)
            address = stdout_path.read_text().strip().removeprefix("ready grpc=")
            yield address
            if role != "router":
                wait_until(lambda: not held(address), 2, lambda: f"nothing held: {held(address)}")
            process.terminate()
            assert process.wait(STOP_DEADLINE_S) == 0, log_path.read_text()
        except BaseException:
            print(f"--- {role}\n{log_path.read_text()[-8000:]}")
            raise
        finally:
            process.kill()
            process.wait(STOP_DEADLINE_S)


@contextmanager
def lone_decode(model_dir: Path, **flags: object) -> Iterator[str]:
    """The address of a decode worker that may dial every source on loopback."""
    with serve("decode", model=model_dir, **flags) as address:
        yield address


@contextmanager
def unequal_pair(model_dir: Path, prefill: dict[str, object], decode: dict[str, object]) -> Iterator[str]:
    """A router's address, before a prefill and a decode worker with flags of their own."""
    with (
        serve("prefill", model=model_dir, **prefill) as source,
        serve("decode", model=model_dir, peers=source, **decode) as reader,
        serve("router", model=model_dir, prefill=source, decode=reader) as router,
    ):
        yield router


def held(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        stream = WorkerServiceStub(channel).WatchLoad(pb.WatchLoadRequest(interval_s=0), timeout=10)
        [load] = stream
    return [f"{getattr(load, name)} {name}" for name in HELD if getattr(load, name)]
