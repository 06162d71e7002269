"""Every order of accept, ready, complete, fail, cancel, timeout, loss and duplicate events, drawn by hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itinerary_world import World

from kvrelay_core.errors import (
    HandoffError,
    InvalidRequestError,
    KvRelayError,
    MismatchError,
    OverloadedError,
    RequestCancelledError,
    UnsupportedError,
    WorkerLostError,
)
from kvrelay_router import itinerary_messages as m
from kvrelay_router.encode_stage import FREE_LOSSES, MAX_FAILURES


@settings(max_examples=600, deadline=None)
@given(
    data=st.data(),
    num_choices=st.integers(1, 3),
    max_tokens=st.integers(1, 4),
    max_replacements=st.integers(0, 3),
    decode_alone_tokens=st.sampled_from([0, 4, 100]),
    num_moves=st.integers(10, 40),
    num_images=st.integers(0, 3),
)
def test_whatever_happens_there_is_one_outcome_and_nothing_is_left(
    data: st.DataObject,
    num_choices: int,
    max_tokens: int,
    max_replacements: int,
    decode_alone_tokens: int,
    num_moves: int,
    num_images: int,
) -> None:
    world = World(num_choices, max_tokens, max_replacements, decode_alone_tokens, num_images)
    for _ in range(num_moves):
        if world.outcomes:
            break
        moves = world.good_moves() if data.draw(st.integers(0, 3)) else world.moves()
        moves[data.draw(st.integers(0, len(moves) - 1))]()
    world.let_it_end()
    world.check_end()


@given(num_choices=st.integers(1, 3), max_tokens=st.integers(1, 4), num_images=st.integers(0, 3))
def test_undisturbed_it_completes_at_the_first_attempt(num_choices: int, max_tokens: int, num_images: int) -> None:
    world = World(num_choices, max_tokens, max_replacements=0, decode_alone_tokens=0, num_images=num_images)
    world.let_it_end()
    world.check_end()
    assert isinstance(world.outcomes[0], m.Complete)
    assert world.itinerary.num_attempts == 1


# ------------------------------------------------------------------------------------------ images

KEY = ("r", 1)


def encoding_world(num_images: int = 2, max_replacements: int = 0, decode_alone_tokens: int = 100) -> World:
    """Placed, and waiting for its images."""
    world = World(1, 3, max_replacements, decode_alone_tokens, num_images)
    world.place("r", "w0")
    assert world.encoding == {KEY: set(world.images)} and not world.prefill
    return world


def end_well(world: World) -> None:
    world.let_it_end()
    world.check_end()
    assert isinstance(world.outcomes[0], m.Complete)


def test_an_item_that_one_encoder_refuses_is_asked_of_another_and_the_others_are_not_asked_again() -> None:
    world = encoding_world()
    first, second = world.images
    world.encoded(KEY, {first}, "e0")
    world.fail_encode(KEY, {second}, "e1", OverloadedError("full"))
    assert world.encoding == {KEY: {second}}
    end_well(world)


@pytest.mark.parametrize("error", [InvalidRequestError("cut off"), MismatchError("another model")])
def test_what_no_other_encoder_could_do_better_fails_at_once(error: KvRelayError) -> None:
    world = encoding_world()
    world.encoded(KEY, {world.images[0]}, "e0")
    world.fail_encode(KEY, {world.images[1]}, "e1", error)
    assert world.outcomes == [m.Fail(error)]
    world.check_end()


def test_encoders_die_of_an_image_no_more_than_twice() -> None:
    world = encoding_world(1)
    world.fail_encode(KEY, set(world.images), "e0", WorkerLostError("gone"))
    assert world.encoding[KEY], "it is tried once more"
    world.fail_encode(KEY, set(world.images), "e1", WorkerLostError("gone"))
    (outcome,) = world.outcomes
    assert isinstance(outcome, m.Fail) and "2 encoders were lost" in outcome.error.message


def test_refusals_are_bounded_too() -> None:
    world = encoding_world(1)
    for _ in range(MAX_FAILURES):
        assert not world.outcomes
        world.fail_encode(KEY, set(world.images), "e0", OverloadedError("full"))
    assert len(world.outcomes) == 1


def test_a_lost_embedding_is_encoded_elsewhere_without_counting_as_a_replacement() -> None:
    world = encoding_world(max_replacements=0)
    for attempt in range(1, 1 + FREE_LOSSES):
        world.encoded(("r", attempt), set(world.images), f"e{attempt - 1}")
        world.lose_embedding(("r", attempt), world.images[0])
        world.place("r", "w0")
    assert world.bad_encoders["r"] == {"e0", "e1"}
    end_well(world)


def test_embeddings_that_are_lost_again_and_again_end_the_request() -> None:
    world = encoding_world(1, max_replacements=1)
    for attempt in range(1, 3 + FREE_LOSSES):
        assert not world.outcomes
        world.encoded(("r", attempt), set(world.images), "e0")
        world.lose_embedding(("r", attempt), world.images[0])
        if world.placing:
            world.place("r", "w0")
    world.check_end()
    assert isinstance(world.outcomes[0], m.Fail)


def test_decode_does_not_compute_images_after_a_lost_hand_off() -> None:
    """Verified KV up to the last placeholder's end is enough; one token less is not."""
    for verified_tokens, resumes in ((2, True), (1, False)):
        world = encoding_world(2, max_replacements=1)
        world.encoded(KEY, set(world.images), "e0")
        world.accept(KEY)
        world.feed(m.HandoffLost("r", 1, HandoffError("lost"), verified_tokens))
        assert bool(world.placing) is not resumes
        end_well(world)


def test_a_cancelled_request_cancels_its_encodes() -> None:
    world = encoding_world()
    world.feed(m.Abandon(RequestCancelledError("gone")))
    assert not world.encoding
    world.check_end()


def test_images_are_never_computed_on_decode_alone() -> None:
    world = World(1, 3, 0, 100, num_images=1)
    world.place("r", "w0", alone=True)
    (outcome,) = world.outcomes
    assert isinstance(outcome, m.Fail) and isinstance(outcome.error, UnsupportedError)
