"""Whatever happens to Redis while KV is stored there and loaded from there, answers stay exact, and no client hears of
it: it is a miss and a count.

One cluster for all: a worker whose pool holds one of three prompts at a time, host memory that holds half of them, and
Redis behind a proxy. Each test leaves Redis well again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from cluster import Cluster
from cuttable_proxy import CuttableProxy
from made_checkpoints import CheckpointMaker
from proxy_thread import ProxyThread
from redis_servers import RedisServer
from tier_questions import FLAGS, Asked, check, question, tier_of, tokens_loaded

from kvrelay.v1 import worker_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT_TOKENS = 1500  # of the 1,584 that the pool holds
RECOVERY_DEADLINE_S = 60.0  # the tier is left alone for up to 30 s


@dataclass
class Scene:
    cluster: Cluster
    redis: RedisServer
    proxy: CuttableProxy
    proxies: ProxyThread
    prompts: list[Asked]

    def tier(self) -> pb.TierReport:
        return tier_of(self.cluster, "redis", "decode-0")

    async def ask_all(self) -> None:
        for asked in self.prompts:
            await check(self.cluster, asked)

    async def ask_until(self, has_happened: Callable[[pb.TierReport], bool], what: str) -> None:
        """Asks on and on, each answer exact, until the tier says so."""
        give_up_s = time.monotonic() + RECOVERY_DEADLINE_S
        while not has_happened(self.tier()):
            assert time.monotonic() < give_up_s, f"not within {RECOVERY_DEADLINE_S:g} s: {what}: {self.tier()}"
            await self.ask_all()

    async def be_well(self) -> None:
        """Until it stores and loads."""
        self.proxies.do(self.proxy.mend)
        before = self.tier()
        loaded = tokens_loaded(self.cluster, "decode")
        await self.ask_until(lambda tier: tier.hits > before.hits, "hits")
        assert tokens_loaded(self.cluster, "decode") > loaded
        self.cluster.assert_no_leaks()


@pytest.fixture(scope="module")
def scene(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("tier-faults")
    model_dir = checkpoint("llama3_scaled")
    prompts = [question(model_dir, PROMPT_TOKENS, seed) for seed in (1, 2, 3)]
    password = folder / "password"
    password.write_text("open-sesame")
    proxies = ProxyThread()
    try:
        with RedisServer(folder / "redis", password="open-sesame") as redis:
            proxy = proxies.open(redis.address)
            flags = FLAGS | {"kv_blocks": 100, "prefill": 0, "host_cache": "512KiB"}
            flags |= {"redis_url": f"redis://{proxy.address}", "redis_password_file": password}
            with Cluster(model_dir, **flags) as cluster:
                yield Scene(cluster, redis, proxy, proxies, prompts)
    finally:
        proxies.close()


@pytest.fixture(autouse=True)
async def well_before(scene: Scene) -> None:
    await scene.be_well()


async def test_it_is_killed_and_comes_back_empty(scene: Scene) -> None:
    scene.redis.kill()
    await scene.ask_until(lambda tier: tier.left_alone, "the tier is left alone")
    before = scene.tier()
    assert before.errors > 0
    await scene.ask_all()
    scene.redis.start()
    await scene.ask_until(lambda tier: tier.written > before.written, "it stores again")
    assert scene.redis.do("DBSIZE") > 0
    await scene.be_well()


@pytest.mark.full
async def test_connections_are_cut_in_the_middle_of_values(scene: Scene) -> None:
    before = scene.tier()
    scene.proxies.do(lambda: scene.proxy.slow(400 << 10))  # a part takes 160 ms
    for asked in scene.prompts:
        answer = asyncio.create_task(check(scene.cluster, asked))
        while not (await asyncio.wait([answer], timeout=0.1))[0]:
            scene.proxies.do(scene.proxy.cut)
        await answer
    assert scene.tier().errors > before.errors
    await scene.be_well()


@pytest.mark.full
async def test_it_answers_half_a_second_late(scene: Scene) -> None:
    scene.proxies.do(lambda: scene.proxy.delay(0.5))
    await scene.ask_all()
    await scene.be_well()


@pytest.mark.full
async def test_it_answers_nothing(scene: Scene) -> None:
    scene.proxies.do(scene.proxy.hold)
    before = scene.tier()
    await scene.ask_until(lambda tier: tier.errors > before.errors, "an error")
    await scene.be_well()


@pytest.mark.full
@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "volatile-lru"])
async def test_it_is_full(scene: Scene, policy: str) -> None:
    """Of 15 parts of 64 KiB it has room for a few, or for none."""
    used = scene.redis.do("INFO", "memory")["used_memory"]
    scene.redis.do("CONFIG", "SET", "maxmemory-policy", policy, "maxmemory", used - (300 << 10))
    before = scene.tier()
    for _ in range(2):
        await scene.ask_all()
    if policy == "noeviction":
        scene.redis.do("CONFIG", "SET", "maxmemory", 1 << 20)
        scene.redis.do("FLUSHALL")
        await scene.ask_until(lambda tier: tier.dropped > before.dropped, "stores that are refused")
    else:
        assert scene.redis.do("INFO", "stats")["evicted_keys"] > 0
    scene.redis.do("CONFIG", "SET", "maxmemory", 0)
    await scene.be_well()


@pytest.mark.full
async def test_it_does_not_let_us_in(scene: Scene) -> None:
    before = scene.tier()
    scene.redis.do("CONFIG", "SET", "requirepass", "another")
    scene.proxies.do(scene.proxy.cut)
    await scene.ask_until(lambda tier: tier.errors > before.errors, "a refused log-in")
    scene.redis.password = "another"
    scene.redis.do("CONFIG", "SET", "requirepass", "open-sesame")
    scene.redis.password = "open-sesame"
    await scene.be_well()


@pytest.mark.full
@pytest.mark.parametrize("lie", ["truncated", "flipped", "swapped", "empty"])
async def test_what_it_gives_is_not_what_it_got(scene: Scene, lie: str) -> None:
    with scene.redis.client() as client:
        names = sorted(client.keys("kvr1:*"))
        values = [client.get(name) for name in names]
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            assert isinstance(value, bytes)
            middle = len(value) // 2
            told = {
                "truncated": value[:middle],
                "flipped": value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :],
                "swapped": values[index - 1],
                "empty": b"",
            }
            client.set(name, told[lie] or b"")
    before = scene.tier()
    await scene.ask_until(lambda tier: tier.bad > before.bad or tier.misses > before.misses, "something bad")
    assert scene.tier().bad > before.bad or lie == "empty"
    await scene.be_well()
