"""Carries out the encodes of one leg: calls to encoders out, their answers in as events. Decides nothing.

While no encoder serves, the items wait for one, for a while: a restart takes seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvrelay.v1.common_pb2 import EmbeddingTicket
from kvrelay.v1.encoder_pb2 import EncodeRequest, EncodeResponse
from kvrelay_core.errors import KvRelayError, MismatchError, UnavailableError
from kvrelay_core.media.video import count_bytes
from kvrelay_core.rpc import wire
from kvrelay_router.encode_messages import Encode, Encoded, EncodeFailed
from kvrelay_router.encoder_session import Answer
from kvrelay_router.fleet import Fleet
from kvrelay_router.placement_wait import WaitTerms

if TYPE_CHECKING:
    from kvrelay_router.request_run import RequestRun


# Of media, in one call: with all that is around them it stays below MAX_MESSAGE_BYTES, and any one item fits.
MAX_CALL_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A call or a wait."""

    stop: Callable[[], None]
    release: Callable[[], None]  # what it holds, when it has ended


class EncodeLink:
    def __init__(self, run: RequestRun, fleet: Fleet, terms: WaitTerms) -> None:
        self._run, self._fleet, self._terms = run, fleet, terms
        self._under_way: dict[object, _UnderWay] = {}

    def encode(self, action: Encode) -> None:
        serving = [key for key, session in self._fleet.registry.encoders.items() if session.is_serving]
        if not serving:
            self._wait(action)
            return
        num_rows = {item: self._run.media_rows[item] for item in action.items}
        for encoder, items in self._fleet.encoders.assign(num_rows, serving, action.avoided).items():
            for part in self._parts(items):
                self._call(action, encoder, part)

    def _parts(self, items: Iterable[bytes]) -> list[tuple[bytes, ...]]:
        """Of which each goes into one message."""
        parts: list[tuple[bytes, ...]] = []
        left = 0
        for item in items:
            num_bytes = count_bytes(self._run.items[item].content)
            if num_bytes > left:
                parts.append(())
                left = MAX_CALL_BYTES
            parts[-1] += (item,)
            left -= num_bytes
        return parts

    def cancel(self) -> None:
        stopped, self._under_way = self._under_way, {}
        for entry in stopped.values():
            entry.stop()
            entry.release()

    def release(self, tickets: Iterable[tuple[str, EmbeddingTicket]]) -> None:
        for encoder, ticket in tickets:
            self._fleet.registry.encoders[encoder].release([ticket])

    # --------------------------------------------------------------------------------------- calls

    def _call(self, action: Encode, encoder: str, items: tuple[bytes, ...]) -> None:
        inputs = [self._run.items[item] for item in items]
        request = EncodeRequest(
            attempt=wire.attempt_to_wire(self._run.attempt_id(action.leg, action.attempt)),
            media=[wire.media_content_to_wire(entry.content, entry.mime_type) for entry in inputs],
            cache_salt=self._run.generation.cache_salt,
            deadline_s=self._run.time_left_s,
        )
        token, session = object(), self._fleet.registry.encoders[encoder]
        done = partial(self._answered, token, action, encoder, items)
        try:
            cancel = session.encode(request, self._terms.encode_s, done)
        except UnavailableError as error:
            self._run.feed(EncodeFailed(action.leg, action.attempt, encoder, items, error))
            return
        loads, num_rows = self._fleet.encoders.loads, sum(self._run.media_rows[item] for item in items)
        loads.charge(encoder, num_rows)
        self._under_way[token] = _UnderWay(cancel, partial(loads.discharge, encoder, num_rows))

    def _answered(self, token: object, action: Encode, encoder: str, items: tuple[bytes, ...], answer: Answer) -> None:
        self._under_way.pop(token).release()
        found = answer if isinstance(answer, KvRelayError) else self._tickets(answer, encoder, items)
        if isinstance(found, KvRelayError):
            if isinstance(answer, EncodeResponse):
                self._fleet.registry.encoders[encoder].release(answer.tickets)
            self._run.feed(EncodeFailed(action.leg, action.attempt, encoder, items, found))
            return
        for item in items:
            self._fleet.encoders.note(encoder, item)
        self._run.feed(Encoded(action.leg, action.attempt, encoder, found))

    def _tickets(
        self, response: EncodeResponse, encoder: str, items: tuple[bytes, ...]
    ) -> dict[bytes, EmbeddingTicket] | MismatchError:
        """One for each item, or why they do not fit the prompt."""
        tickets = {ticket.content_hash: ticket for ticket in response.tickets}
        for item in items:
            ticket = tickets.get(item)
            if ticket is None:
                return MismatchError(f"encoder {encoder} left out an item that it was asked for; check its release")
            if ticket.num_tokens != self._run.media_rows[item]:
                return MismatchError(
                    f"encoder {encoder} makes {ticket.num_tokens} tokens of an item that has "
                    f"{self._run.media_rows[item]} in the prompt; start it and the router with one checkpoint"
                )
        return {item: tickets[item] for item in items}

    # --------------------------------------------------------------------------------------- waits

    def _wait(self, action: Encode) -> None:
        token, registry, absent_s = object(), self._fleet.registry, self._terms.absent_s
        error = UnavailableError(
            f"no encoder serves, nor did one come within {absent_s:g} s; try again later", role="encoder"
        )
        failed = EncodeFailed(action.leg, action.attempt, "", action.items, error)

        def finish(step: Callable[[], None]) -> None:
            entry = self._under_way.pop(token)
            entry.stop()
            entry.release()
            step()

        give_up = partial(finish, partial(self._run.feed, failed))
        timer = asyncio.get_running_loop().call_later(absent_s, self._run.do_guarded, give_up)

        def look() -> None:
            if any(session.is_serving for session in registry.encoders.values()):
                self._run.do_guarded(partial(finish, partial(self.encode, action)))

        self._under_way[token] = _UnderWay(timer.cancel, partial(registry.unwatch, token))
        registry.watch(token, look)
