"""Images in a prefill engine: embeddings are pulled from an encoder, checked, waited for, and kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from encoder_rig import hash_of
from engine_rig import EngineRig, attempt_of, make_generation
from media_rig import MediaPair, first_token_of, generation_of
from msgspec.structs import replace

from kvrelay_core.errors import TransferError
from kvrelay_core.request import ChoiceState, MediaReference
from kvrelay_engine import messages
from kvrelay_engine.engine_media import EngineMedia
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.rope_config import MropeConfig
from kvrelay_transfer.connectors.base import TransferState
from kvrelay_transfer.embedding_layout import EmbeddingLayout

CAT, DOG, COW = b"cat picture", b"a dog, larger than the cat", b"cow"


@pytest.fixture
def pair() -> Iterator[MediaPair]:
    pair = MediaPair()
    yield pair
    pair.close()


def reads_posted(pair: MediaPair) -> int:
    return len(pair.fabric.pending)


@pytest.mark.parametrize(
    "parts", [(5, CAT, 3), (CAT, 4), (6, CAT), (2, CAT, DOG, 1, COW, 2), (3, CAT, 2, CAT, 1)], ids=str
)
def test_the_model_sees_the_pictures_in_their_places(pair: MediaPair, parts: tuple[int | bytes, ...]) -> None:
    pair.start(1, *parts)
    pair.run()
    assert pair.first_token(1) == first_token_of(*parts)
    pair.check_empty()


def test_another_picture_gives_another_answer(pair: MediaPair) -> None:
    for request_id, picture in enumerate((CAT, b"ant picture", b"eel picture")):
        pair.start(request_id, 5, picture, 3)
        pair.run()
        assert pair.first_token(request_id) == first_token_of(5, picture, 3)
    assert len({pair.first_token(request_id) for request_id in range(3)}) == 3


def test_text_before_a_picture_is_computed_while_its_embedding_is_on_its_way(pair: MediaPair) -> None:
    pair.start(1, 20, CAT, 3)
    for _ in range(4):
        pair.turn()
    assert [batch for batch in pair.prefill.runner.batches if batch] == [[16], [4]]
    assert reads_posted(pair) == 1
    pair.run()
    assert pair.first_token(1) == first_token_of(20, CAT, 3)


def test_only_what_the_next_chunk_covers_is_waited_for(pair: MediaPair) -> None:
    pair.start(1, 2, COW, 4, DOG, 2)
    pair.turn()
    first, second = sorted(pair.fabric.pending, key=lambda read: len(read.request.remote_blocks))
    first.land()
    for _ in range(3):
        pair.turn()
    assert sum(map(sum, pair.prefill.runner.batches)) == 2 + len(COW) + 4
    second.land()
    pair.run()
    assert pair.first_token(1) == first_token_of(2, COW, 4, DOG, 2)


def test_a_picture_that_is_here_is_not_pulled_again(pair: MediaPair) -> None:
    pair.start(1, 5, CAT, 3)
    pair.run()
    pair.start(2, 9, CAT, 1)
    for _ in range(3):
        pair.turn()
    assert pair.reader.num_pulled == 1
    assert pair.first_token(2) == first_token_of(9, CAT, 1)
    pair.check_empty()


def test_a_picture_that_two_requests_wait_for_is_pulled_once(pair: MediaPair) -> None:
    tickets = [pair.tickets(CAT), pair.tickets(CAT)]
    pair.start(1, 5, CAT, 3, tickets=tickets[0])
    pair.start(2, 7, CAT, 2, tickets=tickets[1])
    pair.turn()
    assert reads_posted(pair) == 1
    pair.prefill.abort(1)  # the other one goes on
    pair.run()
    assert pair.first_token(2) == first_token_of(7, CAT, 2)
    pair.check_empty()


def test_a_picture_in_the_prefix_cache_is_not_pulled(pair: MediaPair) -> None:
    pair.start(1, 5, CAT, 20)
    pair.run()
    pair.cache.give_back(pair.cache.reserve(4 * pair.cache.num_blocks) or ())
    assert pair.cache.find(hash_of(CAT)) is None, "the embedding was evicted"
    pair.start(2, 5, CAT, 21)
    pair.run()
    assert pair.reader.num_pulled == 1
    assert pair.first_token(2) == first_token_of(5, CAT, 21)
    pair.check_empty()


def test_what_the_prefix_cache_lost_before_the_request_began_is_pulled_after_all(pair: MediaPair) -> None:
    pair.start(1, 5, CAT, 20, DOG, 2)
    pair.run()
    pair.cache.give_back(pair.cache.reserve(4 * pair.cache.num_blocks) or ())
    pair.start(2, 5, CAT, 20, DOG, 3)  # of which only the dog's end is not cached
    pair.prefill.pool.clear_cache()
    pair.run()
    assert pair.first_token(2) == first_token_of(5, CAT, 20, DOG, 3)
    assert pair.reader.num_pulled >= 4
    pair.check_empty()


def test_an_embedding_that_was_evicted_at_the_encoder_is_named(pair: MediaPair) -> None:
    tickets = pair.tickets(CAT)
    pair.encoder.release(tickets[0])
    for number in range(4):
        pair.encoder.release(pair.encoder.encode(bytes([number]) * 52, number))
    pair.start(1, 5, CAT, 3, tickets=tickets)
    pair.run()
    (failed,) = pair.prefill.of(messages.RequestFailed)
    assert failed.error.reason == "EmbeddingLostError"
    assert failed.error.metadata["media"] == hash_of(CAT).hex()
    assert pair.cache.find(hash_of(CAT)) is None, "nothing of a stale read is used"
    assert pair.reader.stale_reads == 1
    pair.check_empty()


def test_a_read_that_fails_is_tried_once_more(pair: MediaPair) -> None:
    pair.start(1, 5, CAT, 3)
    pair.turn()
    pair.fabric.pending[0].end(TransferState.FAILED, TransferError("the network hiccuped"))
    pair.run()
    assert pair.first_token(1) == first_token_of(5, CAT, 3)


def test_an_encoder_that_is_gone_costs_its_requests_alone(pair: MediaPair) -> None:
    tickets = pair.tickets(DOG)
    pair.start(1, 5, CAT, 3)
    pair.run()
    pair.start(2, 2, DOG, 2, tickets=tickets)
    pair.turn()
    pair.prefill.engine.handle(messages.DisconnectPeer(pair.encoder.peer().peer_id))
    pair.start(3, 6, CAT, 2, tickets=pair.tickets(CAT))  # which is here
    pair.run()
    assert pair.prefill.error(2) == "EmbeddingLostError"
    assert pair.first_token(3) == first_token_of(6, CAT, 2)
    pair.check_empty()


def test_an_encoder_that_is_not_connected_in_time_is_given_up(pair: MediaPair) -> None:
    tickets = tuple(replace(ticket, source_address="elsewhere:1") for ticket in pair.tickets(CAT))
    pair.start(1, 5, CAT, 3, tickets=tickets)
    pair.turn()
    assert not pair.prefill.of(messages.RequestFailed)
    pair.clock.advance(5.0)
    pair.turn()
    assert pair.prefill.error(1) == "EmbeddingLostError"


def test_a_cancelled_request_leaves_its_destination_to_the_read(pair: MediaPair) -> None:
    pair.start(1, 5, CAT, 3)
    pair.turn()
    pair.prefill.abort(1)
    pair.turn()
    assert pair.cache.pool.num_in_use == 3 and pair.reader.num_transfers == 1
    pair.reader.check_integrity()
    pair.fabric.land_all()
    pair.turn()
    pair.check_empty()


def test_requests_wait_for_room_in_order_and_all_of_them_end() -> None:
    pair = MediaPair(num_blocks=8)  # 7 blocks of 4 rows: one dog, or two cats
    try:
        requests: list[tuple[int | bytes, ...]] = [(1, DOG, 2), (2, CAT, 3, COW), (4, DOG, 1), (1, COW, 1)]
        for request_id, parts in enumerate(requests):
            pair.start(request_id, *parts)
        pair.run()
        assert [pair.first_token(request_id) for request_id in range(4)] == [first_token_of(*one) for one in requests]
        pair.check_empty()
    finally:
        pair.close()


def test_room_that_does_not_come_is_an_overload() -> None:
    pair = MediaPair(num_blocks=8)
    try:
        pair.start(1, 1, DOG, 2)
        pair.turn()
        pair.start(2, 1, CAT, 2)
        pair.clock.advance(9.9)
        pair.turn()
        assert not pair.prefill.of(messages.RequestFailed)
        pair.clock.advance(0.1)
        pair.turn()
        assert pair.prefill.error(2) == "OverloadedError"
        pair.run()
    finally:
        pair.close()


def test_pictures_that_the_pool_can_never_hold_are_refused() -> None:
    pair = MediaPair(num_blocks=5)
    try:
        pair.start(1, 1, DOG, 2)
        assert pair.prefill.error(1) == "PoolExhaustedError"
        pair.pass_on()
        pair.check_empty()
    finally:
        pair.close()


def test_tickets_that_do_not_fit_the_prompt_are_refused_and_given_back(pair: MediaPair) -> None:
    cat, dog = pair.tickets(CAT)[0], pair.tickets(DOG)[0]
    wrong = [
        (), (dog,), (cat, dog), (replace(cat, num_tokens=5, blocks=cat.blocks[:2], words=cat.words[:2]),),
        (replace(cat, blocks=cat.blocks[:1]),), (replace(cat, layout=EmbeddingLayout("float32", 16, 4)),),
        (replace(cat, layout=EmbeddingLayout("bfloat16", 8, 4)),),
    ]  # fmt: skip
    for request_id, tickets in enumerate(wrong):
        pair.start(request_id, 5, CAT, 3, tickets=tickets)
        assert pair.prefill.error(request_id) == "MismatchError"
    pair.pass_on()
    assert not pair.prefill.engine.has_requests
    pair.check_empty()


def test_a_model_without_images_refuses_them() -> None:
    rig = EngineRig("prefill")
    rig.prefill(1, generation_of(5, CAT))
    assert rig.error(1) == "UnsupportedError"
    rig.check_empty()
    rig.close()


def make_decode() -> EngineRig:
    return EngineRig("decode", media=EngineMedia(MediaTraits(8)))


def test_decode_does_not_compute_placeholders_again() -> None:
    rig = make_decode()
    rig.decode(1, generation_of(5, CAT, 3))
    rig.run()
    (event,) = rig.of(messages.HandedBack)
    assert event.id == 1
    rig.check_empty()
    rig.decode(2, make_generation(list(range(9))))
    rig.run()
    assert rig.finish(2).num_tokens == 6
    rig.close()


def test_a_preempted_request_with_pictures_is_handed_back() -> None:
    rig = make_decode()
    generation = replace(generation_of(5, CAT, 3), choices=(ChoiceState(0, (1, 2)),))
    rig.engine.handle(messages.Decode(1, attempt_of(1), generation))
    rig.run()
    assert [event.id for event in rig.of(messages.HandedBack)] == [1]
    rig.check_empty()
    rig.close()


@pytest.mark.parametrize(("seconds", "fits"), [(8.75, True), (9.0, False), (1e6, False)])
def test_a_video_that_lasts_beyond_the_models_positions_is_refused(seconds: float, fits: bool) -> None:
    """Two tokens that take 36 positions or more, 7 of text and 6 of output; the model has 49."""
    traits = MediaTraits(8, mrope=MropeConfig((1, 1, 2), 2, 4.0), max_positions=49)
    rig = EngineRig("decode", media=EngineMedia(traits))
    video = MediaReference(b"v" * 32, 2, 2, (2, 2, 2), seconds_per_grid=seconds)
    rig.decode(1, replace(make_generation(list(range(9)), max_tokens=6), media=(video,)))
    rig.run()
    if fits:
        assert [event.id for event in rig.of(messages.HandedBack)] == [1], "nothing else is wrong with it"
    else:
        assert rig.error(1) == "InvalidRequestError"
    rig.check_empty()
    rig.close()


@pytest.mark.parametrize("field", ["content_hash", "blocks"])
def test_an_altered_ticket_is_found_out_before_a_row_is_used(pair: MediaPair, field: str) -> None:
    """A reader of the encoder's memory has only the encoder's word for what the blocks are."""
    cat, dog = pair.tickets(CAT, DOG)
    if field == "content_hash":
        altered = replace(dog, content_hash=cat.content_hash)
    else:
        altered = replace(cat, blocks=cat.blocks[::-1], words=cat.words[::-1])
    pair.start(1, 2, CAT, 3, tickets=(altered,))
    pair.run()
    assert pair.prefill.error(1) == "EmbeddingLostError"
    pair.start(2, 2, CAT, 3)
    pair.run()
    assert pair.first_token(2) == first_token_of(2, CAT, 3)
    for ticket in (cat, dog):
        assert pair.encoder.release(ticket), "the altered one gave back nothing"
    pair.check_empty()
