"""What the service makes of its engine's events, and of its own failure to take one."""

from __future__ import annotations

from fake_engine import FakeEngine

from kvrelay_core.errors import InternalError, KvRelayError
from kvrelay_engine import messages


def break_down(*_: object) -> None:
    raise ValueError("a bug")


def test_handlers_get_the_events_of_their_type_in_order() -> None:
    engine = FakeEngine()
    heard: list[tuple[str, int]] = []
    engine.on(messages.SlotFree, lambda event: heard.append(("first", event.slot)))
    engine.on(messages.SlotFree, lambda event: heard.append(("second", event.slot)))
    engine.on(messages.FetchAbort, lambda event: heard.append(("other", event.read)))
    engine.dispatch(messages.SlotFree(3))
    engine.dispatch(messages.FetchAbort(4))
    assert heard == [("first", 3), ("second", 3), ("other", 4)]


def test_an_event_that_the_service_cannot_take_ends_the_worker() -> None:
    engine = FakeEngine()
    losses: list[KvRelayError] = []
    engine.on(messages.SlotFree, break_down)
    engine.on_loss(losses.append)
    for _ in range(2):
        engine.dispatch(messages.SlotFree(1))
    assert [type(error) for error in losses] == [InternalError]


def test_every_part_hears_of_a_loss_even_if_one_of_them_breaks() -> None:
    engine = FakeEngine()
    losses: list[KvRelayError] = []
    engine.on_loss(break_down)
    engine.on_loss(losses.append)
    engine.die()
    assert len(losses) == 1
