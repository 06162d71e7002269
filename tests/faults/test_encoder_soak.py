"""Text and pictures, cancels, and encoders that are killed or stopped, all at random and for a while.

Every answer is the right one or a typed error, nothing is held afterwards, and nobody's memory has grown. SOAK_S in the
environment is how long it takes, SOAK_SEED what it draws.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from answers import Answer
from encoder_cluster import EncoderCluster
from fault_worker import FaultProcess, Part
from picture_questions import PictureQuestion, answer_or_error, new_question
from vision_checkpoints import make_qwen2_5_vl

from kvrelay_client import AsyncClient
from kvrelay_core.errors import InternalError, KvRelayError

SOAK_S = float(os.environ.get("SOAK_S", "60"))
NUM_ASKING = 4
MOST_GROWN_KIB = 48 << 10  # of any one process, from the first quarter to the end
TIMEOUT_S = 60.0

pytestmark = [pytest.mark.cluster, pytest.mark.full, pytest.mark.timeout(6 * SOAK_S + 900)]


class Soak:
    def __init__(self, cluster: EncoderCluster, questions: Sequence[PictureQuestion], seed: int) -> None:
        self._cluster = cluster
        self._questions = questions
        self._draw = random.Random(seed)
        self._end_s = time.monotonic() + SOAK_S
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    async def ask(self) -> None:
        """One request after the other; every third is left in the middle."""
        async with AsyncClient(self._cluster.target) as client:
            while not self.is_over:
                question = self._next()
                asking = asyncio.ensure_future(answer_or_error(client, question, TIMEOUT_S))
                if self._draw.random() < 0.33:
                    await asyncio.wait([asking], timeout=self._draw.uniform(0, 0.4))
                if asking.done() or self._draw.random() < 0.67:
                    self._check(question, await asking)
                else:
                    asking.cancel()
                    await asyncio.wait([asking])
                    self.outcomes["cancelled"] += 1

    def _next(self) -> PictureQuestion:
        """Half of the pictures are new to everybody: what follows an image's end changes its name, and nothing else."""
        question = self._draw.choice(self._questions)
        if self._draw.random() < 0.5:
            return question
        tail = self._draw.randbytes(8)
        return replace(question, pictures=[picture + tail for picture in question.pictures])

    def _check(self, question: PictureQuestion, outcome: Answer | KvRelayError) -> None:
        if isinstance(outcome, Answer):
            assert outcome.token_ids == question.answer, "a wrong token"
            self.outcomes["answered"] += 1
        else:
            assert not isinstance(outcome, InternalError), repr(outcome)
            self.outcomes[f"{type(outcome).__name__}: {outcome.message[:100]}"] += 1

    async def harm(self) -> None:
        """One encoder at a time; the other one serves."""
        while not self.is_over:
            await asyncio.sleep(self._draw.uniform(1.0, 4.0))
            encoder = self._draw.choice(self._cluster.encoders)
            fault = self._draw.choice(("kill", "kill engine", "stop engine", "stop"))
            self.faults[fault] += 1
            await asyncio.to_thread(self._harm, encoder, fault)

    def _harm(self, encoder: FaultProcess, fault: str) -> None:
        if fault == "kill":
            encoder.kill()
        elif fault == "kill engine":
            os.kill(encoder.engine_pid, signal.SIGKILL)
            encoder.process.wait(TIMEOUT_S)
        else:
            part = Part.ENGINE if fault == "stop engine" else Part.BOTH
            encoder.send(signal.SIGSTOP, part)
            time.sleep(self._draw.uniform(0.5, 4.0))
            encoder.send(signal.SIGCONT, part)
        if not encoder.is_running:
            self._cluster.restart(encoder)


def resident_kib(process: FaultProcess) -> dict[int, int]:
    """Of each of its processes."""
    found = {}
    for pid in process.pids:
        [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
        found[pid] = int(line.split()[1])
    return found


async def test_a_soak(tmp_path: Path) -> None:
    seed = int(os.environ.get("SOAK_SEED", str(random.SystemRandom().randrange(10**6))))
    with EncoderCluster(make_qwen2_5_vl(tmp_path / "model")) as cluster:
        questions = [await asyncio.to_thread(new_question, cluster.target, count) for count in (0, 1, 1, 2, 3, 0)]
        lasting = [cluster.router, cluster.decode, *cluster.prefill]
        soak = Soak(cluster, questions, seed)
        tasks = [asyncio.create_task(soak.ask()) for _ in range(NUM_ASKING)] + [asyncio.create_task(soak.harm())]
        try:
            await asyncio.wait(tasks, timeout=SOAK_S / 4, return_when=asyncio.FIRST_EXCEPTION)
            before = {pid: kib for process in lasting for pid, kib in resident_kib(process).items()}
            await asyncio.gather(*tasks)
        finally:
            print(f"seed {seed}: {dict(soak.outcomes)}, {dict(soak.faults)}")
            for task in tasks:
                task.cancel()
        await asyncio.to_thread(cluster.assert_nothing_held, 30.0)
        after = {pid: kib for process in lasting for pid, kib in resident_kib(process).items()}
        grown = {pid: after[pid] - kib for pid, kib in before.items()}
        print(f"resident KiB {after}, grown by {grown}")
        assert max(grown.values()) <= MOST_GROWN_KIB, grown
        assert soak.outcomes["answered"] and sum(soak.faults.values()), "nothing happened"
