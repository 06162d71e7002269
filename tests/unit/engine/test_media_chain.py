"""Wherever an engine looks KV up by its hashes, the same picture in the same place hits and another one never does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from encoder_rig import HIDDEN, EncoderRig
from engine_rig import EnginePair, EngineRig, attempt_of, make_generation
from fake_runner import continuation
from handoff_sides import LAYOUT, MODEL, SourceSide, make_sequence
from media_rig import MediaPair, ReaderSide, generation_of, pass_on_tickets, prompt_of
from msgspec.structs import replace

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import InvalidRequestError, MismatchError
from kvrelay_core.request import MediaReference
from kvrelay_engine import messages
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.handoff_incoming import check_ticket
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.memory import MemoryFabric

TOKENS = list(range(100, 139))  # 4 full units of 8 and 7 tokens
CAT = MediaReference(b"c" * 32, offset=10, num_tokens=9, grid=(1, 6, 6))
DOG = replace(CAT, content_hash=b"d" * 32)
LATE_CAT = replace(CAT, offset=11)
IN_THE_REST = replace(CAT, offset=34, num_tokens=2)


def sequence_of(*media: MediaReference) -> Sequence:
    return make_sequence(TOKENS, media=media)


@pytest.fixture
def source() -> Iterator[SourceSide]:
    source = SourceSide(ManualClock())
    yield source
    source.close()


@pytest.mark.parametrize("media", [(CAT,), (IN_THE_REST,), (CAT, IN_THE_REST), ()])
def test_decode_takes_a_ticket_for_its_own_pictures_alone(source: SourceSide, media: tuple[MediaReference]) -> None:
    """PROTOCOL D2, the tokens behind the last full unit included."""
    ticket = source.prefill(sequence_of(*media))
    check_ticket(ticket, sequence_of(*media), [LAYOUT], MODEL)
    others = [(), (CAT,), (DOG,), (LATE_CAT,), (IN_THE_REST,), (replace(IN_THE_REST, content_hash=b"d" * 32),)]
    for other in others:
        if other != media:
            with pytest.raises(MismatchError, match="hashes"):
                check_ticket(ticket, sequence_of(*other), [LAYOUT], MODEL)


def test_branches_keep_the_pictures_of_their_trunk() -> None:
    trunk = sequence_of(CAT)
    whole = trunk.chain.cover(TOKENS)
    young = sequence_of(CAT).chain.fork()  # before it has hashed anything
    assert young.cover(TOKENS) == whole == trunk.chain.fork().cover(TOKENS)


def test_a_chain_that_grows_with_its_tokens_is_the_one_made_at_once() -> None:
    slow = sequence_of(CAT, IN_THE_REST).chain
    for end in range(1, len(TOKENS) + 1):
        slow.extend(TOKENS[:end])
    assert slow.cover(TOKENS) == sequence_of(CAT, IN_THE_REST).chain.cover(TOKENS)


# ------------------------------------------------------------------------------------------ whole engines

PROMPT = [5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 1, 2]  # with units of 4: text, placeholders, both
IMAGE = MediaReference(b"c" * 32, offset=4, num_tokens=6)


def cached_tokens(pair: MediaPair, request_id: int, *parts: int | bytes) -> int:
    """Runs a prompt of 12 tokens, and says how much of it came from the prefix cache."""
    pair.start(request_id, *parts)
    pair.run()
    (finished,) = (event for event in pair.prefill.of(messages.PrefillFinished) if event.id == request_id)
    return finished.usage.cached_tokens


def test_an_engine_reuses_kv_of_the_same_picture_in_the_same_place_alone() -> None:
    pair = MediaPair()
    try:
        assert cached_tokens(pair, 1, 4, b"my cat", 2) == 0
        assert cached_tokens(pair, 2, 4, b"my cat", 2) == 8, "all but the last unit, whose last token is computed"
        assert cached_tokens(pair, 3, 4, b"my dog", 2) == 4, "the text before it"
        assert cached_tokens(pair, 4, 5, b"a cat", 2) == 4
        assert cached_tokens(pair, 5, 12) == 4
    finally:
        pair.close()


@pytest.mark.parametrize(
    "media",
    [(replace(IMAGE, num_tokens=9),), (IMAGE, IMAGE), (replace(IMAGE, content_hash=b""),)],
)
def test_references_that_do_not_fit_the_prompt_are_refused(media: tuple[MediaReference, ...]) -> None:
    rig = EngineRig("prefill")
    try:
        generation = replace(make_generation(PROMPT, 1), media=media)
        rig.prefill(1, generation)
        rig.run()
        assert rig.error(1) == InvalidRequestError.__name__
    finally:
        rig.close()


def test_a_hand_off_with_a_picture_arrives() -> None:
    clock, fabric = ManualClock(), MemoryFabric()
    encoder = EncoderRig(clock=clock, fabric=fabric)
    said: list[messages.Event] = []
    side = ReaderSide(clock, fabric, said.append)
    side.reader.handle(messages.ConnectPeer(encoder.peer()))
    pair = EnginePair(prefill={"media": side.media}, decode={"media": EngineMedia(MediaTraits(HIDDEN))})
    try:
        generation = generation_of(4, b"my cat", 2, max_tokens=4)
        pair.generations[1] = generation
        tickets = (encoder.encode(b"my cat"),)
        pair.source.engine.handle(messages.Prefill(1, attempt_of(1), generation, True, None, tickets))
        for _ in range(50):
            pair.turn()
            fabric.land_all()
            pass_on_tickets(said, encoder, side.reader)
        assert pair.answer(1) == continuation(prompt_of(4, b"my cat", 2)[2], 4)
        assert not pair.reader.of(messages.HandoffLost) and not pair.reader.of(messages.RequestFailed)
        pair.check_empty()
    finally:
        pair.close()
        side.close()
        encoder.close()
