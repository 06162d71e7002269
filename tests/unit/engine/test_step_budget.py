"""Steps stay short however slow the device is, and become large where it is fast."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine_rig import EngineRig, make_generation, prompt_of
from fake_runner import FakeRunner, continuation

from kvrelay_core.clock import ManualClock
from kvrelay_engine.runner import BatchRow
from kvrelay_engine.step_budget import FIRST_STEP_TOKENS, StepBudget


class SlowRunner(FakeRunner):
    """Takes its time by the manual clock: so much a step, and so much a token, more the longer the context."""

    def __init__(self, pool: torch.Tensor, clock: ManualClock, step_s: float, token_s: float, context_s: float) -> None:
        super().__init__(pool)
        self._clock = clock
        self._times_s = (step_s, token_s, context_s)
        self.took_s: list[float] = []

    def run(self, batch: Sequence[BatchRow]) -> torch.Tensor:
        step_s, token_s, context_s = self._times_s
        took_s = step_s + sum(len(row.token_ids) * (token_s + context_s * row.start) for row in batch)
        self._clock.advance(took_s)
        self.took_s.append(took_s)
        return super().run(batch)


def slow_rig(step_s: float, token_s: float, context_s: float = 0.0) -> tuple[EngineRig, SlowRunner]:
    rig = EngineRig(kv_blocks=600, max_batched_tokens=512)
    runner = SlowRunner(rig.memory.tensor, rig.clock, step_s, token_s, context_s)
    rig.engine._runner = runner
    return rig, runner


@pytest.mark.parametrize("token_s", [0.004, 0.016, 0.1])
def test_a_slow_device_gets_short_steps(token_s: float) -> None:
    rig, runner = slow_rig(0.05, token_s)
    rig.decode(1, make_generation(prompt_of(1500), 4))
    rig.run()
    assert rig.tokens(1) == continuation(prompt_of(1500), 4)
    first_s = 0.05 + FIRST_STEP_TOKENS * token_s
    assert runner.took_s[0] <= first_s + 1e-9
    assert max(runner.took_s[1:]) <= 1.1, "no step but the very first can be a surprise"
    rig.close()


def test_steps_shrink_as_a_long_context_makes_tokens_dearer() -> None:
    rig, runner = slow_rig(0.01, 0.002, 0.000005)
    rig.decode(1, make_generation(prompt_of(2000), 2))
    rig.run()
    assert max(runner.took_s) <= 1.5
    assert runner.batches[-2][0] < max(map(sum, runner.batches))
    rig.close()


def test_a_fast_device_gets_all_that_is_allowed() -> None:
    rig, runner = slow_rig(0.001, 0.00001)
    rig.decode(1, make_generation(prompt_of(1900), 2))
    rig.run()
    assert [sum(batch) for batch in runner.batches[:5]] == [64, 128, 256, 512, 512]
    rig.close()


def test_decoding_sequences_always_get_their_token() -> None:
    """However slow it is: a step of one token each is as short as a step can be."""
    rig, runner = slow_rig(5.0, 0.0)
    for request_id in range(8):
        rig.decode(request_id, make_generation(prompt_of(5, request_id), 6))
    rig.run()
    assert [8] in [[len(batch)] for batch in runner.batches]
    for request_id in range(8):
        assert rig.tokens(request_id) == continuation(prompt_of(5, request_id), 6)
    rig.close()


def test_small_steps_say_nothing_of_large_ones() -> None:
    budget = StepBudget(512, target_s=1.0)
    for _ in range(100):
        budget.record(3, 0.4)
    assert budget.for_decodes(0) == FIRST_STEP_TOKENS
    budget.record(64, 0.6)
    assert budget.for_decodes(0) == 64, "twice as much would take too long"
    budget.record(64, 0.5)
    assert budget.for_decodes(0) == 128
    budget.record(100, 4.0)
    assert budget.for_decodes(0) == 25
    assert budget.for_decodes(100) == 108
