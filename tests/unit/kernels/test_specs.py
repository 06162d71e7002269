"""The specs are complete, repeatable, and able to fail."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvrelay_kernels
from kvrelay_kernels.spec import OpSpec
from kvrelay_kernels.specs import all_specs

PACKAGE = Path(kvrelay_kernels.__file__).parent
CPU = torch.device("cpu")


def test_every_op_folder_has_its_files_and_a_spec() -> None:
    folders = {init.parent for init in PACKAGE.glob("*/__init__.py")}
    for folder in folders:
        assert {"op.py", "reference.py", "kernel.py", "spec.py"} <= {file.name for file in folder.iterdir()}
    in_specs = {spec.kernel.split(".")[1] for spec in all_specs().values()}
    assert in_specs == {folder.name for folder in folders}


def test_every_public_function_has_a_spec() -> None:
    public = {
        name
        for init in PACKAGE.glob("*/__init__.py")
        for name in importlib.import_module(f"kvrelay_kernels.{init.parent.name}").__all__
    }
    assert public - {"AttentionBatch", "noise_key"} == {spec.kernel.split(":")[1] for spec in all_specs().values()}


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.name)
def test_inputs_are_repeatable_and_runs_leave_them_alone(spec: OpSpec) -> None:
    for shape in spec.shapes:
        first, second = (spec.inputs(shape, torch.float32, CPU) for _ in range(2))
        spec.run(spec.reference, first)
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.name)
def test_the_op_takes_the_reference_path_on_the_cpu(spec: OpSpec) -> None:
    module, function = spec.kernel.split(":")
    op = getattr(importlib.import_module(module.replace(".kernel", ".op")), function)
    for shape in spec.shapes:
        inputs = spec.inputs(shape, torch.float32, CPU)
        expected = spec.run(spec.reference, inputs)
        actual = spec.run(lambda **arguments: op(*arguments.values()), inputs)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.name)
def test_a_wrong_kernel_is_noticed(spec: OpSpec) -> None:
    shape = "odd" if "odd" in spec.shapes else next(iter(spec.shapes))

    def corrupt(tensor: torch.Tensor) -> None:
        first = tensor.reshape(-1)[:1] + 1
        tensor.view(-1)[:1].copy_(first) if tensor.is_contiguous() else tensor[(0,) * tensor.dim()].add_(1)

    def wrong(**arguments: object) -> object:
        result = spec.reference(**arguments)
        outputs = [arguments[name] for name in spec.changed]
        outputs += [result] if isinstance(result, torch.Tensor) else list(result or [])
        output = outputs[0]
        assert isinstance(output, torch.Tensor)
        corrupt(output)
        return result

    class WithWrongKernel(OpSpec):
        def load_kernel(self) -> object:  # type: ignore[override]
            return wrong

    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    with pytest.raises(AssertionError):
        WithWrongKernel(**fields).check(shape, torch.float32, CPU)


def test_ops_on_the_cpu_do_not_import_triton() -> None:
    script = (
        "import sys; import kvrelay_kernels.specs; import kvrelay_kernels.norm, torch;"
        "kvrelay_kernels.norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6);"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
