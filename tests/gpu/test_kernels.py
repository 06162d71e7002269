"""Every Triton kernel against its torch reference on an NVIDIA GPU, in every dtype that the op takes."""

import importlib

import pytest
import torch

from kvrelay_kernels.kv_copy import reference
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


@pytest.mark.parametrize("shape", list(all_specs()["copy_rows"].shapes))
def test_rows_are_copied_by_a_remembered_compilation_too(shape: str) -> None:
    from kvrelay_kernels.kv_copy.row_copier import RowCopier

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    copier = RowCopier(stream)
    for _ in range(3):
        inputs = all_specs()["copy_rows"].inputs(shape, torch.bfloat16, torch.device("cuda"))
        expected = inputs["out"].clone()
        rest = (inputs["offsets_2P"], inputs["spacing"], inputs["alignment"])
        reference.copy_rows(inputs["source"], expected, *rest)
        torch.cuda.synchronize()
        copier.copy(inputs["source"].data_ptr(), inputs["out"], *rest)
        stream.synchronize()
        assert torch.equal(inputs["out"], expected)
