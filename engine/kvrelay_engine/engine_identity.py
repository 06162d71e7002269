"""Who issues tickets."""

from __future__ import annotations

from msgspec import Struct


class EngineIdentity(Struct, frozen=True):
    """Who issues the tickets. `address` is where readers reach this worker's KvSourceService."""

    worker_id: str
    address: str
    engine_epoch: bytes
    model_fingerprint: bytes
