"""A connector that breaks while it carries a pair of workers is left for the next one, and taken again after its rest.

Real processes; what breaks is the reader's shared memory (`stopping_engine`). Clients notice nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from answers import Answer, ask
from checkpoints import reference_greedy
from fault_cluster import FaultCluster
from fault_matrix import ClusterKind
from fault_scene import cell_salt
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

VOCAB_SIZE = 384
PROMPT_TOKENS, ANSWER_TOKENS = 700, 12  # 44 blocks
MIN_MARGIN = 2e-4
REST_S = 2.0
BACK_WITHIN_S = 20.0


class Asker:
    """Asks one question again and again, each time as another tenant; every answer has to be right."""

    def __init__(self, cluster: FaultCluster, prompt: list[int], expected: list[int]) -> None:
        self.cluster, self._prompt, self._expected = cluster, prompt, expected

    async def ask(self) -> Answer:
        async with self.cluster.client() as client:
            answer = await ask(
                client, token_ids=self._prompt, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True,
                cache_salt=cell_salt(),
            )  # fmt: skip
        assert answer.token_ids == self._expected, "a wrong token"
        assert (answer.end.timing.attempts, answer.handoff.blocks_pulled) == (1, 44)
        self.cluster.note(answer.end)
        return answer


@pytest.fixture
def asker(checkpoint: CheckpointMaker) -> Iterator[Asker]:
    model_dir = checkpoint("qwen3")
    prompt = make_prompt(VOCAB_SIZE, PROMPT_TOKENS, 0)
    [expected] = reference_greedy(model_dir, [prompt], ANSWER_TOKENS, min_margin=MIN_MARGIN)
    flags = {"block_tokens": 16, "kv_blocks": 160, "max_num_seqs": 8, "max_batched_tokens": 64}
    environment = {"STOPPING_ENGINE_REST_S": f"{REST_S}"}
    with FaultCluster(model_dir, ClusterKind("auto", ("auto", "auto")), flags, environment) as cluster:
        yield Asker(cluster, prompt, expected)


async def test_reads_that_fail_go_by_the_next_connector_and_come_back(asker: Asker) -> None:
    cluster = asker.cluster
    assert (await asker.ask()).handoff.connector == "shm"
    pair = cluster.next_pair
    reader, other = cluster.decode[pair.reader], cluster.decode[1 - pair.reader]
    address = cluster.readers_address(pair.source)
    reader.arm("broken")
    try:
        assert (await asker.ask()).handoff.connector == "grpc"
        assert cluster.latest == pair
        shm, grpc = reader.links(address)
        assert (shm.connector, shm.current, shm.fallbacks, shm.reads) == ("shm", False, 1, 0)
        assert shm.failed_reads >= 2, "it is left at the second failure"
        assert (grpc.connector, grpc.current, grpc.fallbacks, grpc.failed_reads) == ("grpc", True, 0, 0)
        assert grpc.reads > 0 and grpc.bytes > 0
        assert all(not link.fallbacks and link.connector == "shm" for link in other.load().links)
    finally:
        reader.disarm("broken")
    give_up_s = time.monotonic() + BACK_WITHIN_S
    while (await asker.ask()).handoff.connector != "shm" or cluster.latest != pair:
        assert time.monotonic() < give_up_s, f"not by shm again\n{reader.log()}"
    shm, grpc = reader.links(address)
    assert (shm.current, shm.fallbacks, shm.reads > 0) == (True, 1, True)
    assert (grpc.current, grpc.fallbacks) == (False, 0)
    cluster.assert_settled()
