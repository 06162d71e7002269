"""Runs one decode worker: `kvrelay serve decode`."""

from __future__ import annotations

from kvrelay_decode.role import DecodeRole
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.server import serve_worker


async def serve(config: WorkerConfig) -> int:
    """Returns the process's exit code; see `kvrelay_worker.server.serve_worker`."""
    return await serve_worker(config, DecodeRole)
