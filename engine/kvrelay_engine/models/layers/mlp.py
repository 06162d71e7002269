"""The gated feed-forward network of one layer, with one fused projection for gate and up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_kernels.activation import silu_mul


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate_up_OE: Tensor  # O = 2 F: all gates, then all ups
    gate_up_bias_O: Tensor | None
    down_EF: Tensor
    down_bias_E: Tensor | None


class GatedMlp:
    def __init__(self, weights: MlpWeights, make_linear: MakeLinear) -> None:
        self._project_gate_up = make_linear(weights.gate_up_OE, weights.gate_up_bias_O)
        self._project_down = make_linear(weights.down_EF, weights.down_bias_E)

    def __call__(self, x_NE: Tensor) -> Tensor:
        return self._project_down(silu_mul(self._project_gate_up(x_NE)))
