"""KV outlives the workers that computed it: what one left in a tier another one loads, and the answers stay those of
`transformers`, token for token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_until
from made_checkpoints import CheckpointMaker
from redis_servers import RedisServer
from tier_questions import CHUNK, FLAGS, check, chunks, question, tokens_loaded

from kvrelay_transfer.tiers.part_key import PREFIX

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", password="tell-nobody") as server:
        yield server


def flags_of(place: str, redis: RedisServer, tmp_path: Path) -> dict[str, Any]:
    if place == "disk":
        return {**FLAGS, "disk_cache": f"{tmp_path}/kv:1GiB"}
    password = tmp_path / "password"
    password.write_text("tell-nobody\n")
    return {**FLAGS, "redis_url": f"redis://{redis.address}", "redis_password_file": password}


@pytest.mark.parametrize("place", ["redis", pytest.param("disk", marks=pytest.mark.full)])
async def test_a_conversation_goes_on_in_another_cluster(
    checkpoint: CheckpointMaker, redis: RedisServer, tmp_path: Path, place: str
) -> None:
    """Prefill stored its prompt and decode what it said; SIGTERM came right behind the answer."""
    model_dir, flags = checkpoint("llama3_scaled"), flags_of(place, redis, tmp_path)
    first = await asyncio.to_thread(question, model_dir, 3500, num_tokens=100)
    second = await asyncio.to_thread(question, model_dir, 400, after=first.said)
    for asked, num_cached in ((first, 0), (second, chunks(3599))):
        with Cluster(model_dir, **flags) as cluster:
            answer = await check(cluster, asked)
            assert answer.end.usage.cached_tokens == num_cached == tokens_loaded(cluster, "prefill")
            cluster.assert_no_leaks()
            assert "tell-nobody" not in cluster.everything_said()
    assert chunks(3599) > chunks(3500), "the last chunk was decode's"


async def test_a_worker_that_starts_anew_finds_its_own(
    checkpoint: CheckpointMaker, redis: RedisServer, tmp_path: Path
) -> None:
    """Killed: what was written within 2 s is there. And another tenant does not find it."""
    model_dir = checkpoint("llama3_scaled")
    asked = await asyncio.to_thread(question, model_dir, 1500)
    with Cluster(model_dir, **flags_of("redis", redis, tmp_path), host_cache="64MiB") as cluster:
        await check(cluster, asked)
        wait_until(lambda: redis.do("DBSIZE") == chunks(1500) // CHUNK, 2, "all of it is in Redis")
        for role, old_pid in [(role, cluster.kill(role)) for role in ("prefill", "decode")]:
            cluster.wait_restarted(role, 0, old_pid)
        assert (await check(cluster, asked, cache_salt="another")).end.usage.cached_tokens == 0
        assert (await check(cluster, asked)).end.usage.cached_tokens == chunks(1499)
        cluster.assert_no_leaks()


@pytest.mark.full
async def test_prefill_and_decode_may_cut_their_pools_differently(
    checkpoint: CheckpointMaker, redis: RedisServer, tmp_path: Path
) -> None:
    model_dir = checkpoint("llama3_scaled")
    asked = await asyncio.to_thread(question, model_dir, 1000)
    for block_tokens, num_cached in ((64, 0), (16, chunks(999)), (256, chunks(999))):
        flags = flags_of("redis", redis, tmp_path) | {"block_tokens": block_tokens}
        with Cluster(model_dir, **flags) as cluster:
            assert (await check(cluster, asked)).end.usage.cached_tokens == num_cached
            cluster.assert_no_leaks()


@pytest.mark.full
@pytest.mark.parametrize("model", ["llama3_scaled", "qwen3"])
async def test_a_lossless_codec_changes_nothing(
    checkpoint: CheckpointMaker, redis: RedisServer, tmp_path: Path, model: str
) -> None:
    model_dir = checkpoint(model)
    asked = await asyncio.to_thread(question, model_dir, 1000)
    for codec, num_cached in (("zstd", 0), ("zstd", chunks(999)), ("none", 0)):
        flags = flags_of("redis", redis, tmp_path) | {"cache_codec": codec}
        with Cluster(model_dir, **flags) as cluster:
            assert (await check(cluster, asked)).end.usage.cached_tokens == num_cached
            cluster.assert_no_leaks()


@pytest.mark.full
async def test_nobody_without_the_secret_finds_or_forges(
    checkpoint: CheckpointMaker, redis: RedisServer, tmp_path: Path
) -> None:
    model_dir = checkpoint("llama3_scaled")
    asked = await asyncio.to_thread(question, model_dir, 1000)
    secret = tmp_path / "secret"
    names: list[set[bytes]] = []
    for content, num_cached in (("00" * 32, 0), ("11" * 32, 0), ("00" * 32, chunks(999))):
        secret.write_text(content)
        with Cluster(model_dir, **flags_of("redis", redis, tmp_path), cache_secret_file=secret) as cluster:
            assert (await check(cluster, asked)).end.usage.cached_tokens == num_cached
        names.append(set(redis.do("KEYS", f"{PREFIX}:*")))
    assert len(names[0]) == 3 and len(names[1]) == 6 and names[2] == names[1]


async def test_host_memory_brings_back_what_the_pool_gave_away(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    asked = await asyncio.to_thread(question, model_dir, 1000)
    other = await asyncio.to_thread(question, model_dir, 1550, seed=7)
    flags = FLAGS | {"kv_blocks": 100, "prefill": 0}  # 1,584 tokens
    with Cluster(model_dir, **flags, host_cache="64MiB") as cluster:
        for one, num_loaded in ((asked, 0), (other, 0), (asked, chunks(999))):
            before = tokens_loaded(cluster, "decode")
            await check(cluster, one)
            assert tokens_loaded(cluster, "decode") - before == num_loaded
        cluster.assert_no_leaks()
