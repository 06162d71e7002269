"""The cosines and sines that `apply_rope` reads, for every supported kind of RoPE scaling.

With M-RoPE some dimensions turn by a token's time, others by its height or width. Where the three differ, one row of
the table is put together for each token of the step, once for all layers; `apply_rope` knows nothing of it.

Frequencies follow transformers' formulas and order of operations, so that float32 results are the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_engine.models.layers.step import ModelStep
from kvrelay_engine.rope_config import MropeConfig, RopeConfig


@dataclass(frozen=True, slots=True)
class RopeRows:
    """What `apply_rope` takes for the tokens of a step: token i has the row `rows_N[i]` of the table."""

    rows_N: Tensor
    cos_sin_PD: Tensor


class Rope:
    """One position a token, or three for the dimensions that `mrope` gives to each."""

    def __init__(self, cos_sin_PD: Tensor, mrope: MropeConfig | None = None) -> None:
        self._cos_sin_PD = cos_sin_PD
        self._component_D = None if mrope is None else _component_of(mrope, cos_sin_PD.device)

    @property
    def size_bytes(self) -> int:
        return self._cos_sin_PD.nbytes

    def rows(self, step: ModelStep) -> RopeRows:
        positions_3N = step.positions_3N
        if positions_3N is None:
            return RopeRows(step.positions_N, self._cos_sin_PD)
        assert self._component_D is not None, "this model's tokens have one position each"
        positions_ND = positions_3N.index_select(0, self._component_D).t()
        rows_N = torch.arange(len(positions_ND), device=positions_ND.device)
        return RopeRows(rows_N, self._cos_sin_PD.gather(0, positions_ND))


def _component_of(mrope: MropeConfig, device: torch.device) -> Tensor:
    """int64 [D]: which of the three positions each cosine, then each sine, is of."""
    component_C = torch.repeat_interleave(torch.arange(3), torch.tensor(mrope.sections))
    return torch.cat([component_C, component_C]).to(device)


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """float32 [P, D]: for each position D/2 cosines, then D/2 sines."""
    positions_P = torch.arange(num_positions, dtype=torch.float32)
    angles_PC = torch.outer(positions_P, inverse_frequencies(rope, head_dim))
    return torch.cat([angles_PC.cos(), angles_PC.sin()], dim=-1).mul_(rope.attention_factor).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [D / 2]: radians per position."""
    frequencies_C = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain_C = 1.0 / frequencies_C
    if rope.rope_type == "linear":
        return plain_C / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, plain_C)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, frequencies_C)
    return plain_C


def _llama3(rope: RopeConfig, plain_C: Tensor) -> Tensor:
    """Stretches long wavelengths by the factor, keeps short ones, and blends in between."""
    wavelength_C = 2 * math.pi / plain_C
    smooth_C = (rope.original_max_len / wavelength_C - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended_C = (1 - smooth_C) * plain_C / rope.factor + smooth_C * plain_C
    is_long_C = wavelength_C > rope.original_max_len / rope.low_freq_factor
    is_short_C = wavelength_C < rope.original_max_len / rope.high_freq_factor
    return torch.where(is_long_C, plain_C / rope.factor, torch.where(is_short_C, plain_C, blended_C))


def _yarn(rope: RopeConfig, head_dim: int, frequencies_C: Tensor) -> Tensor:
    """Blends by dimension: those with many rotations over the original context are kept, slow ones stretched."""

    def dimension_with(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp_C = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept_C = 1 - ramp_C
    return 1.0 / (rope.factor * frequencies_C) * (1 - kept_C) + 1.0 / frequencies_C * kept_C
