"""Engines with a sliding group, for tests: small pools, a window of ten tokens, blocks of four."""

from __future__ import annotations

from typing import Any

from engine_rig import EnginePair, EngineRig

WINDOW = 10  # tokens; a block has 4
LONG = {"kv_blocks": 256, "max_batched_tokens": 16, "max_num_seqs": 4}


def make_rig(role: str = "decode", **changes: Any) -> EngineRig:
    return EngineRig(role, window=WINDOW, **(LONG | {"decode_alone_tokens": 1000} | changes))


def make_pair(*, prefill: dict[str, Any] | None = None, **decode: Any) -> EnginePair:
    common: dict[str, Any] = {"window": WINDOW, **LONG}
    return EnginePair(prefill=common | (prefill or {}), decode=common | decode)


def drop(rig: EngineRig, prompt: list[int], lost: tuple[int, ...]) -> None:
    """Takes blocks at these positions of the sliding group out of the cache."""
    assert rig.sliding is not None
    chain = rig.engine._cache.new_chain("")
    chain.extend(prompt)
    rig.sliding.pool.disown([chain.keys()[index] for index in lost])
