"""Runs one encoder worker: `kvrelay serve encoder`."""

from __future__ import annotations

from kvrelay_encoder.role import EncoderRole
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.server import serve_worker


async def serve(config: WorkerConfig) -> int:
    """Returns the process's exit code; see `kvrelay_worker.server.serve_worker`."""
    return await serve_worker(config, EncoderRole)
