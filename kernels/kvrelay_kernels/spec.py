"""What every op declares about itself, so that one test and one benchmark serve all of them.

An `OpSpec` names the op, its torch reference, its Triton kernel, the shapes worth testing, how to build inputs
for a shape, and how far the two may differ. Knows nothing of any op; `kvrelay_kernels.specs` lists them.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tolerance:
    relative: float
    absolute: float


EXACT = Tolerance(0.0, 0.0)

FLOAT_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1e-2),
    torch.float16: Tolerance(2e-3, 1e-3),
}


@dataclass(frozen=True, slots=True)
class OpSpec:
    """`build(shape, dtype, generator)` returns the arguments by name, in the order of the op's own, on the CPU.

    `changed` names those that the op changes in place.
    """

    name: str
    schema: str  # signature with shapes
    reference: Callable[..., Any]
    kernel: str  # "module:function"; imported on use, since CPU installations have no Triton
    shapes: Mapping[str, Shape]
    build: Callable[[Shape, torch.dtype, torch.Generator], Inputs]
    tolerances: Mapping[torch.dtype, Tolerance]  # its keys are the dtypes that the op takes
    changed: tuple[str, ...] = ()
    requirement: str = "Triton 3.6 or later"

    def load_kernel(self) -> Callable[..., Any]:
        module, function = self.kernel.split(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded

    def inputs(self, shape: str, dtype: torch.dtype, device: torch.device) -> Inputs:
        """The same inputs for the same arguments, whatever the device."""
        generator = torch.Generator().manual_seed(1234)
        return {
            name: _to_device(value, device) for name, value in self.build(self.shapes[shape], dtype, generator).items()
        }

    def run(self, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        """Calls it on a copy of the inputs. Returns its results, then the arguments that it changed."""
        arguments = {name: copy.deepcopy(value) for name, value in inputs.items()}
        result = function(**arguments)
        results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
        return results + [arguments[name] for name in self.changed]

    def check(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        """Raises AssertionError where kernel and reference differ by more than the tolerance."""
        inputs = self.inputs(shape, dtype, device)
        expected = self.run(self.reference, inputs)
        actual = self.run(self.load_kernel(), inputs)
        assert len(actual) == len(expected), f"{self.name}: {len(actual)} results instead of {len(expected)}"
        tolerance = self.tolerances[dtype]
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(
                one, other, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=True, check_stride=False
            )


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # A view stays a view, with its strides and what lies between.
        num_elements = value.untyped_storage().nbytes() // value.element_size()
        storage = value.as_strided((num_elements,), (1,), 0).to(device)
        return storage.as_strided(value.shape, value.stride(), value.storage_offset())
    # Structured arguments, such as an attention batch, move themselves.
    return value.to(device) if hasattr(value, "to") else value
