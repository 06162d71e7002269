"""Projections y = x W^T + b, with the weight in the memory order that is fastest where it lies.

On the CPU in float32 a weight packed by oneDNN makes batches of 2 to 32 tokens up to 1.7 times as fast as a plain
one, and lets a single token use all threads; a prompt of hundreds of tokens is 1.08 times as fast with a plain one,
so a prefill engine keeps its weights plain. The rows of a packed weight cannot be read, so that a tied embedding
is kept beside it, and column-major: so it is up to 1.6 times as fast for a single token as row-major.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # x_NI -> y_NO
MakeLinear = Callable[[Tensor, Tensor | None], Linear]  # of a weight [O, I], which it takes over, and a bias [O]

# oneDNN chooses its block sizes for this many rows; the packed weight serves any number.
_PACK_FOR_ROWS = 8


def linear_for_tokens(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """The projection in the fastest form for a few tokens at a time, on the weight's device and in its dtype."""
    return PackedLinear(weight_OI, bias_O) if _packs(weight_OI) else PlainLinear(weight_OI, bias_O)


def linear_for_prompts(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """The projection in the fastest form for hundreds of tokens at a time."""
    return PlainLinear(weight_OI, bias_O)


def _packs(weight_OI: Tensor) -> bool:
    return bool(weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32 and torch._C._has_mkldnn)


class PlainLinear:
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        return F.linear(x_NI, self._weight_OI, self._bias_O)


class PackedLinear:
    """The weight lives only in oneDNN's blocked format. float32 on the CPU."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight_OI, _PACK_FOR_ROWS)
        self._bias_O = bias_O
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x_NI: Tensor) -> Tensor:
        y_NO: Tensor = self._multiply(x_NI, self._packed, self._bias_O, "none", [], "")
        return y_NO


class TiedLinear:
    """The projection by an embedding, whose rows are read too: `rows_OI` is the same matrix.

    Where packing pays, the matrix is held twice: packed for batches, which then take 0.6 of the time, and
    column-major, in which a single token is faster still.
    """

    def __init__(self, weight_OI: Tensor, make_linear: MakeLinear) -> None:
        self.rows_OI = column_major(weight_OI)
        self._project_one: Linear = PlainLinear(self.rows_OI)
        made = make_linear(weight_OI, None)
        is_packed = isinstance(made, PackedLinear)
        self._project_many = made if is_packed else self._project_one
        self.copied_bytes = weight_OI.nbytes if is_packed else 0

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self._project_one(x_NI) if x_NI.shape[0] == 1 else self._project_many(x_NI)


def column_major(weight_OI: Tensor) -> Tensor:
    """The same matrix in the memory order that suits a single token on the CPU; unchanged on a GPU."""
    return weight_OI.t().contiguous().t() if weight_OI.device.type == "cpu" else weight_OI
