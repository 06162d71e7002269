"""Every cell of the fault matrix (`fault_matrix`), with real processes, on every connector.

After each cell: no worker that lives holds anything, its books are right, and the cluster serves the next request.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from answers import Answer
from checkpoints import reference_greedy
from fault_actions import FAULT_ACTIONS, Fault
from fault_cluster import FaultCluster
from fault_matrix import (
    CELLS,
    CLUSTERS,
    CONNECTORS,
    FAULTS,
    LEFT_OUT,
    RUN_CELLS,
    Cell,
    ClusterKind,
    Network,
    Outcome,
    Stage,
    family_of,
    is_sampled,
    sample,
)
from fault_rivals import RIVALS
from fault_scene import (
    BETWEEN_DATA_AND_WORDS,
    BUSY_NOTICE_S,
    BUSY_S,
    POINTS,
    Asking,
    Question,
    Scene,
    cell_salt,
)
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

from kvrelay_core.errors import KvRelayError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

VOCAB_SIZE = 384
# Longer than what decode computes by itself: a lost hand-off is placed anew. 44 blocks of 16.
PROMPT_TOKENS = 700
ANSWER_TOKENS = 60
MIN_MARGIN = 2e-4
SAMPLE_SEED = 6
UNDISTURBED_S = 20.0


@pytest.fixture(scope="module")
def question(checkpoint: CheckpointMaker) -> Question:
    """Its answer does not hang on rounding. Each request has a salt of its own, so nothing is found in a cache."""
    model_dir = checkpoint("qwen3")
    for seed in range(20):
        prompt = make_prompt(VOCAB_SIZE, PROMPT_TOKENS, seed)
        try:
            [answer] = reference_greedy(model_dir, [prompt], ANSWER_TOKENS, min_margin=MIN_MARGIN)
        except AssertionError:
            continue
        return prompt, answer
    raise AssertionError("no prompt has a stable answer")


class Clusters:
    """One at a time: that of the kind asked for last."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._kind: ClusterKind | None = None
        self._running = ExitStack()

    def of(self, kind: ClusterKind) -> FaultCluster:
        if kind != self._kind:
            self._running.close()
            flags = {"block_tokens": 16, "kv_blocks": 160, "max_num_seqs": 8, "max_batched_tokens": 64}
            self._cluster = self._running.enter_context(FaultCluster(self._model_dir, kind, flags))
            self._kind = kind
        return self._cluster

    def close(self) -> None:
        """Asserts that nothing is left."""
        self._running.close()


@pytest.fixture(scope="module")
def clusters(checkpoint: CheckpointMaker) -> Iterator[Clusters]:
    made = Clusters(checkpoint("qwen3"))
    yield made
    made.close()


def cell_parameters() -> Iterator[ParameterSet]:
    for kind in CLUSTERS:
        place = "" if kind.network is Network.PROXIES else f", {kind.network.value}"
        for cell in [cell for cell in RUN_CELLS if kind.has(cell.fault)]:
            for connector in kind.connectors:
                marks = [] if is_sampled(SAMPLE_SEED, kind, cell, connector) else [pytest.mark.full]
                name = f"{cell.fault}, {cell.stage.value}, {connector}{place}".replace(" ", "-")
                yield pytest.param(kind, cell, connector, id=name, marks=marks)


@pytest.mark.parametrize(("kind", "cell", "connector"), list(cell_parameters()))
def test_cell(clusters: Clusters, question: Question, kind: ClusterKind, cell: Cell, connector: str) -> None:
    cluster = clusters.of(kind)
    with ThreadPoolExecutor(8) as pool:
        try:
            ask_until_next_reads_by(cluster, pool, question, connector)
            scene = Scene(cluster, cluster.next_pair, connector, cell.stage)
            if cell.fault in RIVALS:
                RIVALS[cell.fault](scene, pool, question, cell)
            else:
                print(run_cell(scene, pool, question, cell, FAULT_ACTIONS[cell.fault]))  # shown by -rP
            cluster.assert_settled()
            ask_undisturbed(cluster, pool, question)
            cluster.assert_settled()
        except BaseException:
            print(cluster.logs())
            cluster.recover()
            raise


def run_cell(scene: Scene, pool: ThreadPoolExecutor, question: Question, cell: Cell, fault: Fault) -> dict[str, float]:
    """Seconds from the fault until each noticed who should, and until the answer was there."""
    _, expected = question
    asking = ask_at_stage(scene, pool, question, fault)
    scene.wait_stage()
    assert not asking.is_over, "the fault came too late to prove anything"
    fault.inject(scene)
    scene.go_on()
    undoing = None if fault.lasts_s is None else pool.submit(undo_at, scene, fault, fault.lasts_s)
    noticing = [pool.submit(scene.await_notice, n, cell.noticed_within_s + BUSY_NOTICE_S) for n in cell.notices]
    try:
        answer = asking.result(cell.answer_within_s + BUSY_S)
        measured = {"answer_s": round(time.monotonic() - scene.started_s, 2)}
        for notice, noticed in zip(cell.notices, noticing, strict=True):
            measured[f"{notice.value}_s"] = round(noticed.result(), 2)
    finally:
        undoing = undoing or pool.submit(undo_at, scene, fault, fault.at_least_s)
        undoing.result()
    check_answer(scene, cell, answer, expected)
    return measured


def ask_at_stage(scene: Scene, pool: ThreadPoolExecutor, question: Question, fault: Fault) -> Asking:
    """The request, on its way to where the fault is to find it."""
    prompt, expected = question
    if fault.between_data_and_words:
        scene.stall_reads()
    else:
        scene.arm(POINTS[scene.stage][:1] if fault.only_reader_stops else None)
    asking = Asking(pool, scene.cluster.target, prompt, len(expected), salt=cell_salt())
    if fault.between_data_and_words:
        scene.arm_then_read(BETWEEN_DATA_AND_WORDS[scene.connector])
    return asking


def undo_at(scene: Scene, fault: Fault, elapsed_s: float) -> None:
    time.sleep(max(0.0, scene.started_s + elapsed_s - time.monotonic()))  # what is prescribed, not waited for
    fault.undo(scene)


def check_answer(scene: Scene, cell: Cell, answer: Answer | KvRelayError, expected: list[int]) -> None:
    assert isinstance(answer, Answer), repr(answer)
    assert answer.token_ids == expected, "a wrong token"
    scene.cluster.note(answer.end)
    attempts = answer.end.timing.attempts
    match cell.outcome:
        case Outcome.GOES_ON:
            assert attempts == 1
        case Outcome.MOVES:
            assert attempts > 1
        case other:
            assert other is Outcome.RIGHT


# ------------------------------------------------------------------------------------------- undisturbed


def ask_until_next_reads_by(
    cluster: FaultCluster, pool: ThreadPoolExecutor, question: Question, connector: str
) -> None:
    """The router places in turn: once we know where it is, at most one request lies between."""
    for _ in range(3):
        if cluster.latest is not None and cluster.connectors[cluster.next_pair.reader] == connector:
            return
        ask_undisturbed(cluster, pool, question)
    raise AssertionError("the router does not place in turn")


def ask_undisturbed(cluster: FaultCluster, pool: ThreadPoolExecutor, question: Question) -> None:
    prompt, expected = question
    answer = Asking(pool, cluster.target, prompt, len(expected), salt=cell_salt()).result(UNDISTURBED_S)
    assert isinstance(answer, Answer), repr(answer)
    assert answer.token_ids == expected
    assert answer.end.timing.attempts == 1
    assert answer.handoff.blocks_pulled == 44
    cluster.note(answer.end)


# ------------------------------------------------------------------------------------------ completeness


def test_the_matrix_is_complete() -> None:
    """Each fault at each stage is run, or is no case for a reason that is given; and each can be brought about."""
    assert {(cell.fault, cell.stage) for cell in CELLS} == {(fault, stage) for fault in FAULTS for stage in Stage}
    assert len(CELLS) == len(FAULTS) * len(Stage)
    assert set(FAULTS) == FAULT_ACTIONS.keys() | RIVALS.keys()
    assert set(CONNECTORS) == BETWEEN_DATA_AND_WORDS.keys()
    for cell in CELLS:
        assert bool(cell.reason) == (cell.outcome is Outcome.NOT_A_CASE)
        assert (cell.answer_within_s > 0) == (cell.outcome is not Outcome.NOT_A_CASE)


def test_the_sample_covers_every_kind_of_fault_stage_and_connector() -> None:
    chosen = sample(SAMPLE_SEED)
    assert {family_of(cell.fault) for cell, _ in chosen} == set(map(family_of, FAULTS))
    assert {cell.stage for cell, _ in chosen} == set(Stage)
    assert {connector for _, connector in chosen} == set(CLUSTERS[0].connectors)


def test_every_other_connector_is_in_every_run_and_nothing_is_left_out_without_a_reason() -> None:
    sampled = Counter(
        connector
        for kind in CLUSTERS
        for cell in RUN_CELLS
        for connector in kind.connectors
        if kind.has(cell.fault) and is_sampled(SAMPLE_SEED, kind, cell, connector)
    )
    assert all(sampled[connector] >= 4 for connector in CONNECTORS)
    tried = {(connector, kind.network) for kind in CLUSTERS for connector in kind.connectors}
    assert not tried & LEFT_OUT.keys()
    assert tried | LEFT_OUT.keys() == set(product(CONNECTORS, Network))
