"""The explicit-state model finds no violation within its bound, and one as soon as a rule is switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

import pytest
from protocol_model.attempts import AttemptRules
from protocol_model.cases import LARGE_SCENES, MISSED_RULES, SCENES, MissedRule, Scene
from protocol_model.explorer import STUCK, explore
from protocol_model.lease import LeaseRules
from protocol_model.memory import MemoryRules
from protocol_model.resources import ResourceRules
from protocol_model.tokens import TokenRules

RULES = [f.name for rules in (MemoryRules, ResourceRules, LeaseRules, TokenRules, AttemptRules) for f in fields(rules)]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_all_rules_together_hold(scene: Scene) -> None:
    found = scene.search(None)
    assert found.violation is None, str(found.violation)
    assert found.is_complete, "the scene is meant to be visited whole"


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scene", LARGE_SCENES, ids=lambda scene: scene.name)
def test_all_rules_together_hold_within_the_large_bound(scene: Scene) -> None:
    found = scene.search(None)
    assert found.violation is None, str(found.violation)


@pytest.mark.parametrize("missed", MISSED_RULES, ids=lambda missed: missed.rule)
def test_every_rule_is_missed_when_switched_off(missed: MissedRule) -> None:
    violation = missed.scene.search(missed.rule).violation
    assert violation is not None, f"{missed.rule} can be left out of {missed.scene.name!r} without harm"
    print(violation)
    assert violation.kind == missed.kind
    assert violation.trace, "something must have happened"


def test_every_switch_has_a_case() -> None:
    assert Counter(missed.rule for missed in MISSED_RULES) == Counter(RULES)


class Corridor:
    """Rooms 0 .. length; from room 2 a trapdoor leads to a cellar of two rooms with no way back."""

    def __init__(self, length: int, *, trapdoor: bool = False, forbidden: int | None = None) -> None:
        self._length = length
        self._trapdoor = trapdoor
        self._forbidden = forbidden

    def initial(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[tuple[str, int]]:
        if state < 0:
            yield "turn", -1 if state == -2 else -2
        elif state < self._length:
            yield f"to {state + 1}", state + 1
            if state == 2 and self._trapdoor:
                yield "fall", -1

    def violation(self, state: int) -> str | None:
        return f"FORBIDDEN: room {state}" if state == self._forbidden else None

    def is_finished(self, state: int) -> bool:
        return state == 3


class TestExplorer:
    def test_visits_every_state_once(self) -> None:
        found = explore(Corridor(3))
        assert (found.num_states, found.is_complete, found.violation) == (4, True, None)

    def test_gives_the_trace_to_a_violation(self) -> None:
        violation = explore(Corridor(3, forbidden=2)).violation
        assert violation is not None
        assert (violation.kind, violation.detail, violation.trace) == ("FORBIDDEN", "room 2", ("to 1", "to 2"))

    def test_a_state_without_steps_that_is_not_the_end_is_stuck(self) -> None:
        violation = explore(Corridor(1)).violation
        assert violation is not None and violation.kind == STUCK

    def test_finds_endless_turns_only_when_asked_for_progress(self) -> None:
        corridor = Corridor(3, trapdoor=True)
        assert explore(corridor).violation is None
        violation = explore(corridor, must_progress=True).violation
        assert violation is not None
        assert (violation.kind, violation.trace) == (STUCK, ("to 1", "to 2", "fall"))

    def test_stops_at_the_bound(self) -> None:
        found = explore(Corridor(3), max_states=2)
        assert not found.is_complete and found.violation is None
