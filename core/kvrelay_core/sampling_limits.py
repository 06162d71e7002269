"""Which sampling values are accepted, at the front door and again by every engine.

The bounds keep float32 arithmetic finite: one request's extreme value must never spoil the batch it runs in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float = math.inf
    above: bool = False  # `low` itself is not allowed

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and value <= self.high and (value > self.low if self.above else value >= self.low)

    def __str__(self) -> str:
        lower = f"{'above' if self.above else 'at least'} {self.low:g}"
        return lower if math.isinf(self.high) else f"{lower} and at most {self.high:g}"


SAMPLING_RANGES = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.01, 100),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
}
LOGIT_BIAS_RANGE = Range(-100, 100)


def check_range(field: str, value: float, allowed: Range) -> None:
    """Raises InvalidRequestError that names the field, the value and the allowed range."""
    if value not in allowed:
        raise InvalidRequestError(f"{field} is {value:g}; allowed: {allowed}", field=field)


def check_sampling(sampling: SamplingParams) -> None:
    for name, allowed in SAMPLING_RANGES.items():
        check_range(f"sampling.{name}", getattr(sampling, name), allowed)
    for bias in sampling.logit_bias.values():
        check_range("sampling.logit_bias", bias, LOGIT_BIAS_RANGE)
