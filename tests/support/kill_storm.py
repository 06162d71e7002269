"""Conversations that go on while a schedule of chance kills, stops and hangs workers, engines and the router.

Every token that arrives has to be the undisturbed one, also those of an answer that ends with an error; an error has to
be one that an operator would expect of a worker that went away; and something has to end each wait. `kvrelay up` starts
again what was killed, and nothing but what was killed may end.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import grpc
from checkpoints import reference_answers
from cluster import Cluster
from oracle import make_prompt

from kvrelay_client import AsyncClient, Delta
from kvrelay_core.errors import HandoffError, OverloadedError, UnavailableError

EXPECTED_ERRORS = (UnavailableError, HandoffError, OverloadedError)
VOCAB = 200
NUM_TALKS, NUM_TURNS = 5, 4
FIRST_TOKENS, NEXT_TOKENS, ANSWER_TOKENS = (80, 300), (10, 60), 40
MIN_MARGIN = 2e-4
NUM_TALKERS = 8
DEADLINE_S = 60.0  # of a request: twenty times what an undisturbed one takes on two busy cores
HUNG_S = DEADLINE_S + 10
RETRY_PAUSE_S = 0.2
PAUSE_S = (0.5, 2.5)  # between two harms
STOPPED_S = (0.2, 5.0)
ANSWERS_WITHIN_S = 2.0
BACK_WITHIN_S = 60.0
# Without its router a cluster does nothing, and one that dies often is started again after 10 s only.
WEIGHTS = {
    "service killed": 3,
    "engine killed": 3,
    "worker stopped": 3,
    "engine hung": 3,
    "router killed": 1,
    "router stopped": 1,
}


class Turn(NamedTuple):
    prompt: list[int]
    answer: list[int]


def make_talks(model_dir: Path) -> list[list[Turn]]:
    """Conversations whose answers do not hang on rounding."""
    talks: list[list[Turn]] = []
    seed = 0
    while len(talks) < NUM_TALKS:
        seed += 1
        talk = _make_talk(model_dir, random.Random(seed))
        if talk is not None:
            talks.append(talk)
    return talks


def _make_talk(model_dir: Path, chance: random.Random) -> list[Turn] | None:
    said: list[int] = []
    talk = []
    for number in range(NUM_TURNS):
        said = said + make_prompt(
            VOCAB, chance.randint(*(NEXT_TOKENS if number else FIRST_TOKENS)), chance.randrange(1 << 30)
        )
        [answer] = reference_answers(model_dir, [said], ANSWER_TOKENS)
        if answer.margin < MIN_MARGIN:
            return None
        talk.append(Turn(said, answer.tokens))
        said = said + answer.tokens
    return talk


@dataclass
class KillStorm:
    cluster: Cluster
    talks: list[list[Turn]]
    seed: int
    num_right: int = 0
    num_wrong: int = 0  # that ended with an error after a wrong token
    blocks_pulled_from_others: int = 0  # as far as it was seen before the next kill
    errors: Counter[str] = field(default_factory=Counter)
    harms: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._is_over = False
        self._pulls_seen: dict[str, int] = {}
        self._workers = [(role, index) for role, count in self.cluster.num_workers.items() for index in range(count)]
        self._victims: dict[str, Callable[[], Awaitable[None]]] = {
            "service killed": lambda: self._kill(self._some_worker(), engine=False),
            "engine killed": lambda: self._kill(self._some_worker(), engine=True),
            "worker stopped": lambda: self._stop(self._some_worker(), engine_only=False),
            "engine hung": lambda: self._stop(self._some_worker(), engine_only=True),
            "router killed": lambda: self._kill(("router", 0), engine=False),
            "router stopped": lambda: self._stop(("router", 0), engine_only=False),
        }

    async def run(self, seconds: float) -> None:
        """Returns when nobody is stopped any more and every conversation has come to the end of its turn."""
        async with self.cluster.client() as client:
            talkers = [asyncio.create_task(self._talk(client, number)) for number in range(NUM_TALKERS)]
            harming = asyncio.create_task(self._harm())
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await asyncio.wait([*talkers, harming], return_when=asyncio.FIRST_COMPLETED)
            self._is_over = True
            await asyncio.gather(harming, *talkers)

    async def settle(self) -> None:
        """Until everybody serves again; then each turn once more, with nobody harmed."""
        for role, index in [*self._workers, ("router", 0)]:
            await asyncio.to_thread(self.cluster.wait_restarted, role, index, old_pid=0)
        self._is_over = False
        async with self.cluster.client() as client:
            async with asyncio.timeout(BACK_WITHIN_S):
                await self._ask_until_answered(client, self.talks[0][0], "the router is back")
            for number, talk in enumerate(self.talks):
                for turn in talk:
                    assert await self._ask(client, turn, f"afterwards, {number}"), self.errors
        self._is_over = True
        for worker in self._workers:
            await self.note_pulls(*worker)

    # ------------------------------------------------------------------------------------------ conversations

    async def _talk(self, client: AsyncClient, number: int) -> None:
        """Each conversation as another tenant: its KV is where its own last turn left it, and nowhere else."""
        chance = random.Random(1000 * self.seed + number)
        num_talks = 0
        while not self._is_over:
            num_talks += 1
            for turn in chance.choice(self.talks):
                await self._ask_until_answered(client, turn, f"{number}, {num_talks}")

    async def _ask_until_answered(self, client: AsyncClient, turn: Turn, salt: str) -> None:
        for pause_s in repeat(RETRY_PAUSE_S):
            if self._is_over or await self._ask(client, turn, salt):
                return
            await asyncio.sleep(pause_s)  # as a client would

    async def _ask(self, client: AsyncClient, turn: Turn, salt: str) -> bool:
        tokens: list[int] = []
        try:
            async with asyncio.timeout(HUNG_S):
                async for event in client.generate(
                    token_ids=turn.prompt, max_tokens=len(turn.answer), temperature=0, ignore_eos=True,
                    cache_salt=salt, timeout_s=DEADLINE_S,
                ):  # fmt: skip
                    tokens += event.token_ids if isinstance(event, Delta) else ()
        except EXPECTED_ERRORS as error:
            self.errors[type(error).__name__] += 1
            self.num_wrong += tokens != turn.answer[: len(tokens)]
            return False
        assert tokens == turn.answer, "a wrong token"
        self.num_right += 1
        return True

    # -------------------------------------------------------------------------------------------------- harms

    async def _harm(self) -> None:
        """One after another; those that last go on meanwhile."""
        lasting: set[asyncio.Task[None]] = set()
        while not self._is_over:
            [name] = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
            task = asyncio.ensure_future(self._do(name))
            lasting.add(task)
            task.add_done_callback(lasting.discard)
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))  # the schedule; nothing is waited for
        await asyncio.gather(*lasting)

    async def _do(self, name: str) -> None:
        with suppress(ProcessLookupError, IndexError, ValueError, grpc.RpcError):  # not there, or just started again
            await self._victims[name]()
            self.harms[name] += 1

    async def _kill(self, worker: tuple[str, int], *, engine: bool) -> None:
        """Not while another one of its role is away: what is to be seen is what the others make of it."""
        if worker[0] != "router":
            for index in range(self.cluster.num_workers[worker[0]]):
                await self.note_pulls(worker[0], index)
        pid = self.cluster.engine_pid_of(*worker) if engine else self.cluster.pid_of(*worker)
        os.kill(pid, signal.SIGKILL)

    async def _stop(self, worker: tuple[str, int], *, engine_only: bool) -> None:
        pids = [self.cluster.engine_pid_of(*worker)] if worker[0] != "router" else []
        if not engine_only:
            pids.append(self.cluster.pid_of(*worker))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(*STOPPED_S))
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def note_pulls(self, role: str, index: int) -> None:
        """Before they are forgotten. Raises RpcError where the worker does not serve."""
        load = await asyncio.to_thread(self.cluster.load_of, role, index, timeout_s=ANSWERS_WITHIN_S)
        name = f"{role}-{index}"
        seen, self._pulls_seen[name] = self._pulls_seen.get(name, 0), load.prefix_blocks_pulled
        self.blocks_pulled_from_others += max(0, load.prefix_blocks_pulled - seen)

    def _some_worker(self) -> tuple[str, int]:
        return self._chance.choice(self._workers)

    # ------------------------------------------------------------------------------------------- what it leaves

    @property
    def num_kills(self) -> int:
        return sum(count for name, count in self.harms.items() if name.endswith("killed"))

    def unexplained(self) -> list[str]:
        """Lines of the log that speak of a bug: ends of processes beyond those that were killed, and tracebacks."""
        lines = self.cluster.log_path.read_text(errors="replace").splitlines()
        ends = [line for line in lines if " ended with " in line]
        traces = [line for line in lines if line.startswith("Traceback") or "InternalError" in line]
        return traces + (ends if len(ends) > self.num_kills else [])
