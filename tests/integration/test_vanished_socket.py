"""A source whose pool socket is gone is read over the next connector, with the same tokens, and its link says so."""

from __future__ import annotations

import pytest
from cluster import Cluster
from exactness import check_one_by_one
from made_checkpoints import CheckpointMaker
from oracle import expected_answers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


async def test_the_next_connector_carries_the_pair(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    with Cluster(model_dir, kv_blocks=640, block_tokens=16) as cluster:
        source = cluster.address_of("prefill", 0)
        (socket,) = (cluster.folder / "tmp").rglob("prefill-0.pool.sock")
        socket.unlink()
        cluster.wait_restarted("decode", 0, cluster.kill("decode"))
        async with cluster.client() as client:
            await check_one_by_one(client, expected_answers(model_dir), "grpc")
        (link,) = [link for link in cluster.load_of("decode").links if link.peer == source]
        assert (link.connector, link.current, link.failed_reads, link.stale_reads) == ("grpc", True, 0, 0)
        assert link.reads > 0 and link.bytes == cluster.load_of("decode").handoff_bytes
        assert link.reading_s > 0 and link.mean_read_s > 0 and link.spans >= link.reads
        cluster.assert_no_leaks()
