"""The gated feed-forward network of one layer, with one fused projection for gate and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_kernels.activation import gelu_tanh_mul, silu_mul

GATES: dict[str | None, Callable[[Tensor], Tensor]] = {None: silu_mul, "gelu_pytorch_tanh": gelu_tanh_mul}


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate_up_OE: Tensor  # O = 2 F: all gates, then all ups
    gate_up_bias_O: Tensor | None
    down_EF: Tensor
    down_bias_E: Tensor | None


class GatedMlp:
    def __init__(self, weights: MlpWeights, make_linear: MakeLinear, activation: str | None = None) -> None:
        """`activation` is one of `GATES`."""
        self._gate = GATES[activation]
        self._project_gate_up = make_linear(weights.gate_up_OE, weights.gate_up_bias_O)
        self._project_down = make_linear(weights.down_EF, weights.down_bias_E)

    def __call__(self, x_NE: Tensor) -> Tensor:
        return self._project_down(self._gate(self._project_gate_up(x_NE)))
