"""Workers and client of one itinerary: they check every action, and know every event that may come next."""

from __future__ import annotations

from collections.abc import Callable

from itinerary_calls import ENCODE_ERRORS, ENCODERS, ERRORS, LOST, WORKERS, AtDecode, AtPrefill, Key, token_of

from kvrelay.v1.common_pb2 import EmbeddingTicket, KvTicket
from kvrelay_core.errors import (
    DeadlineError,
    EmbeddingLostError,
    HandoffError,
    KvRelayError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_core.request import ChoiceState, FinishReason, FirstToken, Generation, MediaReference, SamplingParams
from kvrelay_router import encode_messages as e
from kvrelay_router import itinerary_messages as m
from kvrelay_router.committer import Ending, Token
from kvrelay_router.encode_stage import MAX_ENCODER_DEATHS
from kvrelay_router.itinerary import Itinerary


class World:
    """Workers and client of one request. Checks every action; makes every event that may come now."""

    def __init__(
        self, num_choices: int, max_tokens: int, max_replacements: int, decode_alone_tokens: int, num_images: int = 0
    ) -> None:
        self.max_tokens = max_tokens
        self.decode_alone_tokens = decode_alone_tokens
        choices = tuple(map(ChoiceState, range(num_choices)))
        sampling = SamplingParams(max_tokens=max_tokens)
        self.images = tuple(bytes([index]) * 32 for index in range(num_images))
        media = tuple(MediaReference(image, offset, 1) for offset, image in enumerate(self.images))
        generation = Generation(prompt=(1, 2, 3), sampling=sampling, seed=1, choices=choices, media=media)
        self.itinerary = Itinerary("r", generation, max_replacements)
        self.prefill: dict[Key, AtPrefill] = {}
        self.decode: dict[str, AtDecode] = {}
        self.placing: dict[str, m.Place] = {}
        self.encoding: dict[Key, set[bytes]] = {}  # items under way
        self.encoded_by: dict[Key, dict[bytes, str]] = {}
        self.bad_encoders: dict[str, set[str]] = {}  # of each leg
        self.num_encoder_deaths = 0
        self.pinned: dict[Key, set[bytes]] = {}  # tickets that encoders hold pins for
        self.client: dict[int, list[int]] = {index: [] for index in range(num_choices)}
        self.finished: set[int] = set()
        self.stopped: set[int] = set()
        self.outcomes: list[m.Complete | m.Fail] = []
        self.attempts: dict[str, int] = {}
        self.highest_attempt = 0
        self.past: list[m.LegEvent] = []
        self.take(self.itinerary.start())

    # ------------------------------------------------------------------------------ actions, checked

    def take(self, actions: list[m.Action]) -> None:
        for action in actions:
            assert not self.outcomes, f"{action} after the end"
            match action:
                case m.Place(leg=leg, attempt=attempt):
                    self.note_attempt(leg, attempt)
                    self.placing[leg] = action
                case e.Encode():
                    self.encode(action)
                case e.CancelEncode(leg=leg, attempt=attempt):
                    del self.encoding[leg, attempt]
                case e.ReleaseEmbeddings(leg=leg, attempt=attempt):
                    self.release_embeddings((leg, attempt), action)
                case m.OpenPrefill(leg=leg, attempt=attempt):
                    assert (leg, attempt) not in self.prefill
                    assert not self.encoding.get((leg, attempt)), "opened before all its images are encoded"
                    assert tuple(ticket.content_hash for ticket in action.embeddings) == self.images
                    self.encoding.pop((leg, attempt), None)
                    assert len(action.generation.choices) == 1 or not any(
                        c.committed for c in action.generation.choices
                    )
                    self.prefill[leg, attempt] = AtPrefill(action.generation, action.handoff)
                case m.CancelPrefill(leg=leg, attempt=attempt):
                    assert not self.prefill.pop((leg, attempt)).finished, "cancelled what has finished"
                case m.ReleaseTicket(leg=leg, attempt=attempt):
                    assert self.prefill.pop((leg, attempt)).finished, "released what has not finished"
                case m.OpenDecode(leg=leg, attempt=attempt):
                    assert leg not in self.decode
                    starts = {choice.index: len(choice.committed) for choice in action.generation.choices}
                    call = AtDecode(action.generation, action.worker, attempt, next_position=starts)
                    call.has_kv = action.ticket is None
                    self.decode[leg] = call
                case m.ResumeDecode():
                    self.resume(action)
                case m.AbortDecode(leg=leg, attempt=attempt):
                    assert self.decode.pop(leg).attempt == attempt
                case m.AbortChoices():
                    self.abort_choices(action)
                case m.Commit(choice=choice, tokens=tokens):
                    for token in tokens:
                        assert token.position == len(self.client[choice]), "a gap or a token twice"
                        assert choice not in self.finished
                        self.client[choice].append(token.token_id)
                case m.FinishChoice(ending=ending):
                    assert ending.choice not in self.finished | self.stopped
                    assert ending.num_tokens == len(self.client[ending.choice])
                    self.finished.add(ending.choice)
                case m.Complete() | m.Fail():
                    self.outcomes.append(action)

    def encode(self, action: e.Encode) -> None:
        assert action.items and set(action.items) <= set(self.images)
        under_way = self.encoding.setdefault((action.leg, action.attempt), set())
        assert not under_way & set(action.items), "encoded twice at a time"
        assert action.avoided >= self.bad_encoders.get(action.leg, set()), "asked again where it failed"
        assert self.num_encoder_deaths < MAX_ENCODER_DEATHS, "yet another encoder is to die of it"
        under_way.update(action.items)

    def release_embeddings(self, key: Key, action: e.ReleaseEmbeddings) -> None:
        released = {ticket.content_hash: encoder for encoder, ticket in action.tickets}
        assert released == self.encoded_by[key], "all that the attempt had, where it was encoded"
        assert released.keys() == self.pinned.pop(key), "released twice, or after prefill has"

    def abort_choices(self, action: m.AbortChoices) -> None:
        call = self.decode[action.leg]
        assert call.attempt == action.attempt
        assert not call.ended & set(action.choices), "they have ended there already"
        assert set(action.choices) <= self.finished | self.stopped, "somebody still wants them"
        call.ended.update(action.choices)
        if call.ended >= call.next_position.keys():
            del self.decode[action.leg]

    def note_attempt(self, leg: str, attempt: int) -> None:
        assert attempt >= self.attempts.get(leg, 0), "attempts only increase"
        assert attempt <= self.highest_attempt + 1
        self.attempts[leg] = attempt
        self.highest_attempt = max(self.highest_attempt, attempt)

    def resume(self, action: m.ResumeDecode) -> None:
        call = self.decode[action.leg]
        assert call.attempt == action.lost_attempt and not call.has_kv
        assert len(action.choices) == 1 or not any(choice.committed for choice in action.choices)
        self.note_attempt(action.leg, action.attempt)
        call.attempt, call.has_kv, call.resumed = action.attempt, True, True
        call.next_position = {choice.index: len(choice.committed) for choice in action.choices}
        call.ended = set()

    # --------------------------------------------------------------------------------------- events

    def feed(self, event: m.Event) -> None:
        if isinstance(event, m.LegEvent):
            self.past.append(event)
        self.take(self.itinerary.handle(event))

    def moves(self) -> list[Callable[[], None]]:
        """Everything that may happen next, the harmful included."""
        found: list[Callable[[], None]] = []
        for leg in self.placing:
            found += [lambda leg=leg, worker=worker: self.place(leg, worker) for worker in WORKERS]  # type: ignore[misc]
            found.append(lambda leg=leg: self.place(leg, "w0", alone=True))  # type: ignore[misc]
            found.append(lambda leg=leg: self.refuse_place(leg))  # type: ignore[misc]
        for key in self.encoding:
            found += self.encode_moves(key)
        for key in self.prefill:
            found += self.prefill_moves(key)
        for leg in self.decode:
            found += self.decode_moves(leg)
        found.append(lambda: self.feed(m.Abandon(RequestCancelledError("cancelled"))))
        found.append(lambda: self.feed(m.Abandon(DeadlineError("too late"))))
        found += [lambda c=c: self.stop(c) for c in self.client if c not in self.finished | self.stopped]  # type: ignore[misc]
        old = [event for event in self.past if event.attempt < self.highest_attempt]
        found += [lambda event=event: self.repeat(event) for event in old[-3:]]  # type: ignore[misc]
        return found

    def place(self, leg: str, worker: str, *, alone: bool = False) -> None:
        place = self.placing.pop(leg)
        prefill = place.prefill or (None if alone else f"p-{worker}")
        route = m.Route(prefill, f"d-{worker}", self.decode_alone_tokens)
        self.feed(m.Placed(leg, place.attempt, route))

    def refuse_place(self, leg: str) -> None:
        place = self.placing.pop(leg)
        self.feed(m.Unplaced(leg, place.attempt, UnavailableError("nobody")))

    def stop(self, choice: int) -> None:
        self.stopped.add(choice)
        self.feed(m.StopChoice(choice))
        for call in self.decode.values():
            assert choice not in call.next_position or choice in call.ended, "decode computes what nobody wants"

    def repeat(self, event: m.LegEvent) -> None:
        """Of a superseded attempt: must change nothing."""
        leg = self.attempts.get(event.leg, 0)
        if event.attempt < leg:
            before = (dict(self.prefill), dict(self.decode), self.itinerary.committer.num_committed)
            actions = self.itinerary.handle(event)
            assert actions == []
            assert before == (self.prefill, self.decode, self.itinerary.committer.num_committed)

    def encode_moves(self, key: Key) -> list[Callable[[], None]]:
        items = self.encoding[key]
        found: list[Callable[[], None]] = [lambda item=item: self.encoded(key, {item}, "e0") for item in items]  # type: ignore[misc]
        found += [lambda encoder=encoder: self.encoded(key, set(items), encoder) for encoder in ENCODERS]  # type: ignore[misc]
        for error in ENCODE_ERRORS:
            found += [
                lambda error=error, encoder=encoder: self.fail_encode(key, set(items), encoder, error)  # type: ignore[misc]
                for encoder in ENCODERS
            ]
        found.append(lambda: self.fail_encode(key, set(items), "", UnavailableError("no encoder")))
        found += [lambda item=item: self.fail_encode(key, {item}, "e0", OverloadedError("full")) for item in items]  # type: ignore[misc]
        return found

    def encoded(self, key: Key, items: set[bytes], encoder: str) -> None:
        self.encoding[key] -= items
        self.encoded_by.setdefault(key, {}).update(dict.fromkeys(items, encoder))
        self.pinned.setdefault(key, set()).update(items)
        tickets = {item: EmbeddingTicket(content_hash=item) for item in items}
        self.feed(e.Encoded(*key, encoder, tickets))

    def fail_encode(self, key: Key, items: set[bytes], encoder: str, error: KvRelayError) -> None:
        if not self.encoding[key]:
            return
        self.encoding[key] -= items
        self.num_encoder_deaths += isinstance(error, WorkerLostError)
        self.bad_encoders.setdefault(key[0], set()).update({encoder} - {""})
        self.feed(e.EncodeFailed(*key, encoder, tuple(items), error))

    def lose_embedding(self, key: Key, item: bytes) -> None:
        """Prefill could not pull it; it names the item."""
        self.bad_encoders.setdefault(key[0], set()).add(self.encoded_by[key][item])
        self.fail_prefill(key, EmbeddingLostError("its encoder restarted", media=item.hex()))

    def prefill_moves(self, key: Key) -> list[Callable[[], None]]:
        call = self.prefill[key]
        found: list[Callable[[], None]] = [lambda: self.lose_prefill(key)]
        if not call.finished:
            found += [lambda error=error: self.fail_prefill(key, error) for error in ERRORS]  # type: ignore[misc]
            found.append(lambda: self.accept(key))  # also a second time
            found += [lambda item=item: self.lose_embedding(key, item) for item in self.images]  # type: ignore[misc]
        if call.accepted and not call.finished:
            found.append(lambda: self.finish_prefill(key))
        return found

    def accept(self, key: Key) -> None:
        self.prefill[key].accepted = True
        ticket = KvTicket(ticket_id="t") if self.prefill[key].handoff else None
        self.feed(m.PrefillAccepted(*key, ticket))

    def finish_prefill(self, key: Key) -> None:
        call = self.prefill[key]
        call.finished = True
        self.pinned.pop(key, None)  # it has released them
        if not call.handoff or call.handed_over or self.decode_is_through(key[0]):
            del self.prefill[key]  # it holds nothing any more
        tokens = [self.first_token(choice) for choice in call.generation.choices]
        self.feed(m.PrefillFinished(*key, tuple(tokens)))

    def decode_is_through(self, leg: str) -> bool:
        """Decode had its last word before prefill's own: nobody waits for the ticket, nor is to be found for it."""
        states = {held.key: held for held in self.itinerary.legs}
        waits = leg in self.decode or leg in self.placing
        return not waits and leg in states and bool(states[leg].ended_at_decode)

    def first_token(self, choice: ChoiceState) -> FirstToken:
        position = len(choice.committed)
        reason = FinishReason.LENGTH if position + 1 == self.max_tokens else None
        return FirstToken(choice.index, position, token_of(choice.index, position), None, reason)

    def fail_prefill(self, key: Key, error: KvRelayError) -> None:
        del self.prefill[key]
        self.feed(m.PrefillFailed(*key, error))

    def lose_prefill(self, key: Key) -> None:
        del self.prefill[key]
        self.feed(m.PrefillLost(*key, LOST))

    def decode_moves(self, leg: str) -> list[Callable[[], None]]:
        call = self.decode[leg]
        found: list[Callable[[], None]] = [lambda: self.end_decode(leg, m.DecodeLost(leg, call.attempt, LOST))]
        found += [
            lambda error=error: self.end_decode(leg, m.DecodeFailed(leg, call.attempt, error))  # type: ignore[misc]
            for error in ERRORS
        ]
        found.append(lambda: self.end_decode(leg, m.HandedBack(leg, call.attempt, OverloadedError("preempted"))))
        if not call.has_kv:
            found.append(lambda: self.hand_over(leg))
            found.append(lambda: self.feed(m.HandoffLost(leg, call.attempt, HandoffError("lost"))))
        for choice, position in call.next_position.items():
            if choice not in call.ended and (call.has_kv or position == 0):
                found.append(lambda choice=choice: self.generate(leg, choice, 1))  # type: ignore[misc]
                found.append(lambda choice=choice: self.generate(leg, choice, -1))  # type: ignore[misc]
                found.append(lambda choice=choice: self.drop_token(leg, choice))  # type: ignore[misc]
        return found

    def hand_over(self, leg: str) -> None:
        call = self.decode[leg]
        call.has_kv = True
        key = (leg, call.attempt)
        if key in self.prefill:
            self.prefill[key].handed_over = True
            if self.prefill[key].finished:
                del self.prefill[key]  # decode released the ticket
        self.feed(m.HandoffDone(leg, call.attempt))

    def generate(self, leg: str, choice: int, step: int) -> None:
        """The next token, or with step -1 the one before once more; the last one also ends the choice."""
        call = self.decode[leg]
        position = call.next_position[choice] + min(step, 0)
        if not 0 <= position < self.max_tokens:
            return
        call.next_position[choice] = position + 1
        self.feed(m.DecodeTokens(leg, call.attempt, (Token(choice, position, token_of(choice, position)),)))
        if self.decode.get(leg) is not call or position + 1 < self.max_tokens or self.outcomes:
            return
        call.ended.add(choice)
        if call.ended >= call.next_position.keys():
            del self.decode[leg]
        self.feed(m.DecodeEnding(leg, call.attempt, Ending(choice, FinishReason.LENGTH, self.max_tokens)))

    def drop_token(self, leg: str, choice: int) -> None:
        """A token that never arrives: what follows stands behind a gap."""
        call = self.decode[leg]
        if call.next_position[choice] + 1 < self.max_tokens:
            call.next_position[choice] += 1

    def end_decode(self, leg: str, event: m.LegEvent) -> None:
        del self.decode[leg]
        self.feed(event)

    # ------------------------------------------------------------------------------------- the end

    def let_it_end(self) -> None:
        """From now on nothing goes wrong any more; what holds a broken hand-off says so."""
        for _ in range(200):
            if self.outcomes:
                return
            moves = self.good_moves()
            assert moves, f"nobody works: {self.itinerary.legs}"
            moves[0]()
        raise AssertionError(
            f"never ends: {self.itinerary.legs}, {self.prefill}, {self.decode}, {self.placing}, {self.encoding}"
        )

    def good_moves(self) -> list[Callable[[], None]]:
        """Those of workers that do as they should."""
        found: list[Callable[[], None]] = [lambda leg=leg: self.place(leg, "w0") for leg in self.placing]  # type: ignore[misc]
        found += [
            lambda key=key, items=items: self.encoded(key, set(items), "e0")  # type: ignore[misc]
            for key, items in self.encoding.items()
        ]
        for key, call in self.prefill.items():
            if not call.finished:
                step = self.finish_prefill if call.accepted else self.accept
                found.append(lambda key=key, step=step: step(key))  # type: ignore[misc]
        for leg, at_decode in self.decode.items():
            if at_decode.has_kv:
                going_on = at_decode.next_position.keys() - at_decode.ended
                found += [lambda leg=leg, c=c: self.generate(leg, c, 1) for c in sorted(going_on)]  # type: ignore[misc]
            elif (leg, at_decode.attempt) in self.prefill:
                found.append(lambda leg=leg: self.hand_over(leg))  # type: ignore[misc]
            else:
                lost = m.HandoffLost(leg, at_decode.attempt, HandoffError("lost"))
                found.append(lambda lost=lost: self.feed(lost))  # type: ignore[misc]
        return found

    def check_end(self) -> None:
        assert len(self.outcomes) == 1
        assert not self.prefill, "a prefill request was never closed"
        assert not self.decode, "a decode request was never closed"
        assert not any(self.encoding.values()), "an encode was never cancelled"
        assert not self.pinned, "a ticket that nobody will use was never released"
        if isinstance(self.outcomes[0], m.Complete):
            assert self.finished | self.stopped == self.client.keys()
        for choice, tokens in self.client.items():
            assert tokens == [token_of(choice, position) for position in range(len(tokens))]
            assert len(tokens) == self.max_tokens or choice not in self.finished
        assert self.itinerary.handle(m.Abandon(RequestCancelledError("again"))) == []
