"""Every Triton kernel against its torch reference on an NVIDIA GPU, in every dtype that the op takes."""

import importlib

import pytest
import torch

from kvrelay_kernels.specs import all_specs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

CASES = [
    pytest.param(name, shape, dtype, id=f"{name}-{shape}-{str(dtype).removeprefix('torch.')}")
    for name, spec in all_specs().items()
    for dtype in spec.tolerances
    for shape in spec.shapes
]


@pytest.mark.parametrize(("name", "shape", "dtype"), CASES)
def test_kernel_agrees_with_its_reference(name: str, shape: str, dtype: torch.dtype) -> None:
    all_specs()[name].check(shape, dtype, torch.device("cuda"))


@pytest.mark.parametrize("name", list(all_specs()))
def test_the_op_takes_the_kernel_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = all_specs()[name]
    module, function = spec.kernel.split(":")
    calls: list[str] = []
    monkeypatch.setattr(importlib.import_module(module), function, lambda *_: calls.append(name))
    inputs = spec.inputs(next(iter(spec.shapes)), torch.float32, torch.device("cuda"))
    getattr(importlib.import_module(module.replace(".kernel", ".op")), function)(*inputs.values())
    assert calls == [name]
