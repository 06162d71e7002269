from __future__ import annotations

import pytest

from kvrelay_core.errors import ConfigError
from kvrelay_router.placement import (
    Candidate,
    Candidates,
    LeastLoad,
    LoadAccount,
    RequestView,
    RoundRobin,
    eligible,
    make_placement,
)

REQUEST = RequestView(prompt=(1, 2, 3), num_committed=1, max_new_tokens=10)


def candidates(prefill: dict[str, int], decode: dict[str, int]) -> Candidates:
    return Candidates(
        [Candidate(key, tokens) for key, tokens in prefill.items()],
        [Candidate(key, tokens) for key, tokens in decode.items()],
    )


def test_round_robin_takes_each_in_turn_as_workers_come_and_go() -> None:
    policy = RoundRobin()
    all_three = candidates({"a": 9, "b": 0, "c": 0}, {"d": 5})
    assert [policy.place(REQUEST, all_three).prefill for _ in range(4)] == ["a", "b", "c", "a"]
    assert policy.place(REQUEST, candidates({"a": 0, "c": 0}, {"d": 0})).prefill == "c"
    assert policy.place(REQUEST, all_three).decode == "d"


def test_least_load_takes_the_fewest_tokens_and_equals_in_turn() -> None:
    policy = LeastLoad()
    assert policy.place(REQUEST, candidates({"a": 5, "b": 3}, {"x": 0, "y": 1})).prefill == "b"
    cold = candidates({"a": 0, "b": 0, "c": 0}, {"x": 0, "y": 0})
    decisions = [policy.place(REQUEST, cold) for _ in range(6)]
    assert {decision.prefill for decision in decisions} == {"a", "b", "c"}
    assert [decision.decode for decision in decisions].count("x") == 3


def test_who_refused_is_excluded_and_who_lost_is_avoided() -> None:
    workers = [Candidate("a", 0), Candidate("b", 0)]
    keys = [worker.key for worker in eligible(workers, frozenset(), frozenset("a"))]
    assert keys == ["b"]
    assert len(eligible(workers, frozenset(), frozenset("ab"))) == 2, "better there than nowhere"
    assert [worker.key for worker in eligible(workers, frozenset("b"), frozenset("a"))] == ["a"]
    assert eligible(workers, frozenset("ab"), frozenset()) == []


@pytest.mark.parametrize("policy", [RoundRobin(), LeastLoad()])
def test_without_prefill_workers_decode_is_alone(policy: RoundRobin | LeastLoad) -> None:
    decision = policy.place(REQUEST, candidates({}, {"x": 0, "y": 0}))
    assert (decision.prefill, decision.decode) == (None, "x")
    assert policy.place(REQUEST, candidates({"a": 0}, {"x": 0, "y": 0})).prefill == "a"


def test_the_account_of_loads() -> None:
    loads = LoadAccount()
    loads.charge("a", REQUEST.num_input_tokens)
    loads.charge("a", REQUEST.num_total_tokens)
    assert (loads.outstanding("a"), loads.outstanding("b")) == (18, 0)
    loads.discharge("a", 4)
    loads.discharge("a", 14)
    assert loads.total == 0


def test_policies_by_name() -> None:
    assert isinstance(make_placement("round_robin"), RoundRobin)
    assert isinstance(make_placement("least_load"), LeastLoad)
    with pytest.raises(ConfigError, match="least_load"):
        make_placement("random")
