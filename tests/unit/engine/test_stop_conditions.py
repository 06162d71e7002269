"""The last token of a choice, judged from ids."""

from __future__ import annotations

from typing import Any

import pytest
from engine_rig import make_generation

from kvrelay_core.request import FinishReason
from kvrelay_engine.stop_conditions import finish_reason

EOS, STOP, OTHER = 5, 6, 7


@pytest.mark.parametrize(
    ("token", "position", "sampling", "expected"),
    [
        (OTHER, 0, {}, None),
        (EOS, 0, {}, FinishReason.STOP),
        (EOS, 0, {"ignore_eos": True}, None),
        (STOP, 0, {"ignore_eos": True}, FinishReason.STOP),
        (EOS, 0, {"ignore_eos": True, "stop_token_ids": (STOP, EOS)}, FinishReason.STOP),
        (EOS, 1, {"min_tokens": 2}, None),
        (EOS, 2, {"min_tokens": 2}, FinishReason.STOP),
        (OTHER, 8, {}, None),
        (OTHER, 9, {}, FinishReason.LENGTH),
        (EOS, 9, {}, FinishReason.STOP),
        (OTHER, 1, {"max_model_len": 6}, None),
        (OTHER, 2, {"max_model_len": 6}, FinishReason.LENGTH),
    ],
)
def test_finish_reason(token: int, position: int, sampling: dict[str, Any], expected: FinishReason | None) -> None:
    settings: dict[str, Any] = {"stop_token_ids": (STOP,)} | sampling
    max_model_len = settings.pop("max_model_len", 100)
    generation = make_generation([1, 2, 3], 10, eos_token_ids=(EOS,), **settings)
    assert finish_reason(generation, position, token, max_model_len) is expected
