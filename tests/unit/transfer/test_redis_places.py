"""Where keys are when servers change their minds: masters behind Sentinels, slots of a cluster, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from redis_servers import RedisCluster, RedisSentinel, RedisServer, wait_until
from sealed_parts import PART_BYTES, is_whole, key_of, part_of

from kvrelay_transfer.tiers.part_store import StoreError
from kvrelay_transfer.tiers.redis_places import places_of
from kvrelay_transfer.tiers.redis_store import RedisStore
from kvrelay_transfer.tiers.redis_targets import Address, parse_redis_url


def store_at(url: str) -> RedisStore:
    return RedisStore(parse_redis_url(url), timeout_s=10.0)


def put(store: RedisStore, number: int) -> bool:
    return store.put(key_of(number), memoryview(part_of(key_of(number))))


def is_hit(store: RedisStore, number: int) -> bool:
    into = memoryview(bytearray(PART_BYTES))
    length = store.get(key_of(number), into)
    assert length is None or is_whole(key_of(number), into[:length])
    return length is not None


# ------------------------------------------------------------------------------------------------------- Sentinels


class Watched:
    """A master, its replica, and a Sentinel that watches them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.master = stack.enter_context(RedisServer(directory / "master", password="geheim"))
        replicaof = f"replicaof 127.0.0.1 {self.master.port}"
        self.replica = stack.enter_context(RedisServer(directory / "replica", replicaof, password="geheim"))
        self.sentinel = stack.enter_context(RedisSentinel(directory / "sentinel", self.master))
        self.store = stack.enter_context(closing(store_at(self.sentinel.url)))


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(tmp_path, stack)


def test_a_master_that_was_demoted_is_left(watched: Watched) -> None:
    """Its connections stand, and it still reads; at the first write it says READONLY."""
    assert put(watched.store, 1)
    watched.replica.do("REPLICAOF", "NO", "ONE")
    watched.master.do("REPLICAOF", "127.0.0.1", watched.replica.port)
    watched.sentinel.do("SENTINEL", "REMOVE", "tiers")
    watched.sentinel.do("SENTINEL", "MONITOR", "tiers", "127.0.0.1", watched.replica.port, 1)
    with pytest.raises(StoreError, match="READONLY"):
        put(watched.store, 2)
    assert put(watched.store, 2) and is_hit(watched.store, 2)
    assert watched.replica.do("EXISTS", key_of(2).text) == 1


@pytest.mark.full
def test_the_replica_takes_over_from_a_master_that_was_killed(watched: Watched) -> None:
    assert put(watched.store, 1)
    wait_until(lambda: watched.replica.do("EXISTS", key_of(1).text) == 1, "the replica has the part")
    wait_until(lambda: len(watched.sentinel.do("SENTINEL", "REPLICAS", "tiers")) == 1, "the Sentinel knows the replica")
    watched.master.kill()

    def is_well() -> bool:
        try:
            return is_hit(watched.store, 1) and put(watched.store, 2)
        except StoreError:
            return False

    assert not is_well()
    wait_until(is_well, "the store finds the new master")
    assert watched.replica.do("EXISTS", key_of(2).text) == 1


def test_the_first_sentinel_that_answers_is_believed(watched: Watched) -> None:
    url = watched.sentinel.url.replace("@", "@127.0.0.1:1,")
    with closing(store_at(url)) as store:
        assert put(store, 1) and is_hit(store, 1)


def test_sentinels_that_cannot_tell(watched: Watched) -> None:
    with closing(store_at(watched.sentinel.url.replace("/tiers", "/others"))) as store:
        with pytest.raises(StoreError, match="watches no service named 'others'"):
            put(store, 1)
    watched.sentinel.kill()
    with pytest.raises(StoreError, match="nobody tells where the keys are"):
        put(watched.store, 1)


def test_a_master_is_used_without_sentinels_once_it_is_known(watched: Watched) -> None:
    assert put(watched.store, 1)
    watched.sentinel.kill()
    assert is_hit(watched.store, 1) and put(watched.store, 2)


# --------------------------------------------------------------------------------------------------------- cluster

NUMBERS = range(30)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster"), password="geheim") as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: RedisCluster) -> RedisCluster:
    """Empty; a test may move slots, since nobody relies on where they are."""
    for server in shared_cluster.servers:
        server.do("FLUSHALL")
    return shared_cluster


@pytest.fixture
def store(cluster: RedisCluster) -> Iterator[RedisStore]:
    with closing(store_at(cluster.url)) as store:
        yield store


def another(cluster: RedisCluster, owner: RedisServer) -> RedisServer:
    return next(server for server in cluster.servers if server is not owner)


def test_parts_lie_on_all_servers_of_a_cluster(cluster: RedisCluster, store: RedisStore) -> None:
    assert all(put(store, number) for number in NUMBERS)
    assert all(is_hit(store, number) for number in NUMBERS)
    assert all(server.do("DBSIZE") > 0 for server in cluster.servers)
    keys = [key_of(number) for number in NUMBERS]
    assert store.count_prefix(keys) == len(keys)
    assert sorted(store.keys()) == sorted(keys) and store.usage().num_parts == len(keys)
    store.remove(key_of(17))
    store.remove(key_of(23))
    assert store.count_prefix(keys) == 17
    assert store.clear() == len(keys) - 2 and list(store.keys()) == []
    assert store.num_moved == 0


def test_one_server_is_enough_to_find_a_cluster(cluster: RedisCluster) -> None:
    host = cluster.servers[1]
    with closing(store_at(f"redis-cluster://{host.login}127.0.0.1:1,{host.address}")) as store:
        assert all(put(store, number) for number in NUMBERS)


def test_a_slot_that_moved_is_a_miss_once(cluster: RedisCluster, store: RedisStore) -> None:
    assert all(put(store, number) for number in NUMBERS)
    key = key_of(5).text
    to = another(cluster, cluster.owner_of(key))
    cluster.open_slot(key, to)
    cluster.close_slot(key, to)
    assert not is_hit(store, 5) and store.num_moved == 1
    assert is_hit(store, 5) and store.num_moved == 1
    assert all(is_hit(store, number) for number in NUMBERS)


@pytest.mark.parametrize("call", ["put", "remove", "count"])
def test_other_calls_for_a_slot_that_moved(cluster: RedisCluster, store: RedisStore, call: str) -> None:
    assert put(store, 5)
    key = key_of(5).text
    to = another(cluster, cluster.owner_of(key))
    cluster.open_slot(key, to)
    cluster.close_slot(key, to)
    if call == "put":
        assert not put(store, 5) and put(store, 5)
    elif call == "remove":
        store.remove(key_of(5))
        assert is_hit(store, 5)
        store.remove(key_of(5))
        assert not is_hit(store, 5)
    else:
        assert store.count_prefix([key_of(5)]) == 0 and store.count_prefix([key_of(5)]) == 1
    assert store.num_moved == 1


def test_a_slot_on_its_way_is_a_miss_until_it_is_there(cluster: RedisCluster, store: RedisStore) -> None:
    assert put(store, 5) and put(store, 6)
    key = key_of(5).text
    to = another(cluster, cluster.owner_of(key))
    cluster.open_slot(key, to)
    for _ in range(3):
        assert not is_hit(store, 5) and not put(store, 5) and is_hit(store, 6)
    assert store.num_moved == 6
    cluster.close_slot(key, to)
    assert not is_hit(store, 5)
    assert is_hit(store, 5) and put(store, 5)


def test_no_cluster_where_one_was_expected(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        with closing(store_at(f"redis-cluster://{server.address}")) as store:
            with pytest.raises(StoreError, match="cluster support disabled"):
                put(store, 1)


def test_a_server_without_slots_knows_nobody(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", "cluster-enabled yes") as server:
        with closing(store_at(f"redis-cluster://{server.address}")) as store:
            with pytest.raises(StoreError, match="has no slots yet"):
                put(store, 1)
        server.do("CLUSTER", "ADDSLOTSRANGE", 0, 99)
        places = places_of(parse_redis_url(f"redis-cluster://{server.address}"), 10.0)
        assert places.all() == [Address("127.0.0.1", server.port)]


@pytest.mark.full
def test_a_server_of_a_cluster_that_was_killed(tmp_path: Path) -> None:
    """Its parts are misses; those of the others stay, as long as the cluster lets them be read."""
    with RedisCluster(tmp_path, lines=("cluster-require-full-coverage no",)) as cluster:
        with closing(store_at(cluster.url)) as store:
            assert all(put(store, number) for number in NUMBERS)
            lost = cluster.servers[0]
            is_lost = [cluster.owner_of(key_of(number).text) is lost for number in NUMBERS]
            lost.kill()
            for number in NUMBERS:
                if is_lost[number]:
                    with pytest.raises(StoreError, match="redis-cluster://"):
                        is_hit(store, number)
                else:
                    assert is_hit(store, number)
            lost.start()
            cluster.await_ready()
            assert not is_hit(store, is_lost.index(True)) and put(store, is_lost.index(True))
