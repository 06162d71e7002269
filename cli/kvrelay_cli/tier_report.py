"""The tiers of a worker as a table: what `kvrelay doctor --target` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvrelay_cli.table import lines_of

GIB = 2**30

_HEADER = (
    "tier", "parts", "GiB", "of GiB", "hits", "misses", "read GB/s", "written", "queued", "errors", "bad", "dropped",
    "stale", "evicted", "",
)  # fmt: skip


def tier_lines(tiers: Sequence[dict[str, Any]]) -> list[str]:
    """Of TierReports, with the names of the proto."""
    rows = [
        (
            tier["tier"], f"{tier['parts']}", f"{tier['used_bytes'] / GIB:.2f}", _capacity(tier),
            f"{tier['hits']}", f"{tier['misses']}", f"{tier['gb_per_s']:.2f}" if tier["gb_per_s"] else "-",
            *(f"{tier[name]}" for name in ("written", "queued", "errors", "bad", "dropped", "stale", "evicted")),
            "LEFT ALONE after errors" if tier["left_alone"] else "",
        )
        for tier in tiers
    ]  # fmt: skip
    return lines_of(_HEADER, rows)


def _capacity(tier: dict[str, Any]) -> str:
    return f"{tier['capacity_bytes'] / GIB:.2f}" if tier["capacity_bytes"] else "-"
