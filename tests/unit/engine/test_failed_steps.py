"""One failed step is survived; an engine that fails every step ends."""

from __future__ import annotations

from typing import Any

import pytest
from engine_rig import EngineRig, make_generation, prompt_of

from kvrelay_core.errors import InternalError
from kvrelay_engine.failed_steps import MAX_IN_A_ROW, FailedSteps


def test_failures_in_a_row_end_the_engine_and_successes_between_them_do_not() -> None:
    steps = FailedSteps()
    for _ in range(3 * MAX_IN_A_ROW):
        steps.add(RuntimeError("one"))
        steps.clear()
    for _ in range(MAX_IN_A_ROW - 1):
        steps.add(RuntimeError("again"))
    with pytest.raises(InternalError, match="started anew") as caught:
        steps.add(RuntimeError("the device is gone"))
    assert str(caught.value.__cause__) == "the device is gone"


@pytest.fixture
def rig() -> EngineRig:
    return EngineRig()


def test_an_engine_whose_every_step_fails_does_not_stay_in_service(rig: EngineRig) -> None:
    for request_id in range(MAX_IN_A_ROW):
        rig.decode(request_id, make_generation(prompt_of(8, request_id), 5))
        rig.runner.failure = RuntimeError("the device is gone")
        if request_id < MAX_IN_A_ROW - 1:
            rig.run()
    with pytest.raises(InternalError, match="started anew"):
        rig.run()
    assert [rig.error(request_id) for request_id in range(MAX_IN_A_ROW)] == ["InternalError"] * MAX_IN_A_ROW


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": float("nan")},
        {"temperature": 1e39},
        {"repetition_penalty": 1e-50, "top_p": 0.9},
        {"logit_bias": {1: float("inf")}},
    ],
)
def test_values_that_would_spoil_the_batch_are_refused_by_the_engine_too(
    rig: EngineRig, sampling: dict[str, Any]
) -> None:
    rig.decode(1, make_generation(prompt_of(8), 5, **sampling))
    assert rig.error(1) == "InvalidRequestError"
