"""Conversations replayed against the store of host memory: what a cache of a size is worth beside an infinite one."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))

from tier_replay import EVICTIONS, Request, hit_rate, infinite_hit_rate, read_trace  # noqa: E402

from kvrelay_transfer.tiers.eviction import Lru  # noqa: E402

TRACE = Path(os.environ.get("KVRELAY_TRACES", ROOT.parent / "shared" / "traces")) / "conversation_trace.jsonl"


def conversations(num_users: int, num_turns: int, seed: int) -> list[Request]:
    """Turns of all users in random order: each one is the user's last one and some more blocks."""
    chance = random.Random(seed)
    said: list[list[int]] = [[0] for _ in range(num_users)]
    requests, next_id = [], 1
    for user in chance.choices(range(num_users), k=num_users * num_turns):
        for _ in range(chance.randint(1, 6)):
            said[user].append(next_id)
            next_id += 1
        requests.append(Request(512 * len(said[user]) + chance.randint(0, 511), (*said[user], -next_id)))
    return requests


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_room_for_everything_is_as_good_as_infinite(eviction: str) -> None:
    requests = conversations(20, 10, seed=1)
    assert hit_rate(requests, 1e6, EVICTIONS[eviction]()) == infinite_hit_rate(requests) > 0.5


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_less_room_finds_less_and_never_more(eviction: str) -> None:
    requests = conversations(40, 10, seed=2)
    rates = [hit_rate(requests, tokens, EVICTIONS[eviction]()) for tokens in (20e3, 60e3, 200e3, 1e6)]
    assert rates == sorted(rates) and rates[0] < 0.5 * rates[-1]


def test_only_a_whole_prefix_counts() -> None:
    requests = [Request(1536, (1, 2, 3)), Request(1536, (1, 9, 3)), Request(1600, (1, 2, 3, 4))]
    assert infinite_hit_rate(requests) == (0 + 512 + 1536) / (1536 + 1536 + 1600)
    assert hit_rate(requests, 1e6, Lru()) == infinite_hit_rate(requests)


@pytest.mark.skipif(not TRACE.exists(), reason="the published trace is not here; KVRELAY_TRACES names its folder")
def test_25_million_tokens_have_nearly_all_that_a_published_trace_asks_for() -> None:
    """12,031 requests; with room for everything 37.3 % of their tokens are hits."""
    requests = list(read_trace(TRACE))
    best = infinite_hit_rate(requests)
    assert best == pytest.approx(0.373, abs=0.001)
    assert hit_rate(requests, 25e6, Lru()) >= 0.965 * best
