"""Asks a cluster and collects what streams back, choice by choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvrelay_client import AsyncClient, Delta, Finish
from kvrelay_core.request import HandoffTiming

ANSWER_DEADLINE_S = 60.0


@dataclass
class Answer:
    """One choice. `pieces` are the token ids of each delta, in the order in which they came."""

    pieces: list[tuple[int, ...]] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece]

    @property
    def end(self) -> Finish:
        assert self.finish is not None, "the stream ended without a finish"
        return self.finish

    @property
    def handoff(self) -> HandoffTiming:
        assert self.end.timing.handoff is not None, "no KV was handed off"
        return self.end.timing.handoff


async def ask_choices(client: AsyncClient, **request: Any) -> list[Answer]:
    """All choices, by index. Asserts that nothing of a choice comes after its finish, and that each has one."""
    answers: dict[int, Answer] = {}
    async for event in client.generate(**{"timeout_s": ANSWER_DEADLINE_S, **request}):
        answer = answers.setdefault(event.index, Answer())
        assert answer.finish is None, f"{event} after the end of its choice"
        if isinstance(event, Delta):
            answer.pieces.append(tuple(event.token_ids))
            answer.text += event.text
        else:
            answer.finish = event
    for answer in answers.values():
        assert answer.end.usage.completion_tokens == len(answer.token_ids)
    return [answers[index] for index in sorted(answers)]


async def ask(client: AsyncClient, **request: Any) -> Answer:
    [answer] = await ask_choices(client, **request)
    return answer


async def ask_greedy(client: AsyncClient, prompt: list[int], max_tokens: int, cache_salt: str = "") -> list[int]:
    answer = await ask(
        client, token_ids=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, cache_salt=cache_salt
    )
    return answer.token_ids
