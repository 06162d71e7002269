"""The parts of the CUDA connector that need no GPU: signatures of two CUDA versions, errors, and merged runs."""

from __future__ import annotations

import ctypes
import random
from typing import Any, cast

import numpy as np
import pytest
import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.connectors.base import as_blocks
from kvrelay_transfer.connectors.block_runs import count_runs, merge_runs
from kvrelay_transfer.connectors.copy_thread import merge_runs as merge_runs_one_by_one
from kvrelay_transfer.connectors.device_copy import growing_batches
from kvrelay_transfer.cuda_runtime import CudaCallError, CudaRuntime


class FakeFunction:
    argtypes: Any = None
    restype: Any = None

    def __init__(self, library: FakeLibrary, name: str) -> None:
        self._library = library
        self._name = name

    def __call__(self, *arguments: Any) -> object:
        self._library.calls.append((self._name, arguments))
        if self._name == "cudaRuntimeGetVersion":
            arguments[0]._obj.value = self._library.version
        if self._name == "cudaGetErrorString":
            return b"out of memory"
        return self._library.codes.get(self._name, 0)


class FakeLibrary:
    """A libcudart of `version` that does nothing and remembers its calls."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.codes: dict[str, int] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> FakeFunction:
        function = FakeFunction(self, name)
        setattr(self, name, function)
        return function


class FakeStream:
    cuda_stream = 1234


def runtime_of(library: FakeLibrary) -> CudaRuntime:
    return CudaRuntime(cast(ctypes.CDLL, library))


@pytest.mark.parametrize(("version", "num_arguments"), [(12080, 9), (12090, 9), (13000, 8), (13020, 8)])
def test_batched_copies_have_the_signature_of_the_version(version: int, num_arguments: int) -> None:
    library = FakeLibrary(version)
    runtime = runtime_of(library)
    assert runtime.can_batch
    spans = np.arange(1, 4, dtype=np.uint64)
    runtime.copy_batch(spans, spans + np.uint64(10), spans, cast(torch.cuda.Stream, FakeStream()))
    name, arguments = library.calls[-1]
    assert name == "cudaMemcpyBatchAsync"
    assert len(arguments) == num_arguments == len(library.cudaMemcpyBatchAsync.argtypes)
    assert arguments[3] == 3 and arguments[-1] == 1234
    attributes = arguments[4]._obj
    assert ctypes.sizeof(attributes) == 24 and attributes.source_access_order == 1


def test_a_runtime_before_12_8_has_no_batches() -> None:
    assert not runtime_of(FakeLibrary(12040)).can_batch


def test_a_failed_call_is_told_and_leaves_no_error_behind() -> None:
    library = FakeLibrary(13000)
    runtime = runtime_of(library)
    library.codes["cudaIpcGetMemHandle"] = 2
    with pytest.raises(CudaCallError, match=r"cudaIpcGetMemHandle: out of memory \(2\)") as caught:
        runtime.export(4096)
    assert caught.value.code == 2
    assert [name for name, _ in library.calls[-2:]] == ["cudaGetLastError", "cudaGetErrorString"]


def test_an_unknown_bus_id_is_no_device() -> None:
    library = FakeLibrary(13000)
    library.codes["cudaDeviceGetByPCIBusId"] = 1
    assert runtime_of(library).find_device("0000:99:00.0") is None


def test_without_cuda_there_is_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use --device cpu"):
        CudaRuntime.load()


@pytest.mark.parametrize(
    ("num_spans", "span_mib", "sizes"),
    [(0, 2, []), (1, 2, [1]), (4, 2, [4]), (5, 2, [4, 1]), (256, 2, [4, 16, 64, 172]), (7, 64, [1, 4, 2])],
)
def test_batches_grow_and_leave_nothing_out(num_spans: int, span_mib: int, sizes: list[int]) -> None:
    spans = list(range(num_spans))
    batches = [spans[batch] for batch in growing_batches(num_spans, span_mib << 20)]
    assert [len(batch) for batch in batches] == sizes
    assert [span for batch in batches for span in batch] == spans


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_merged_as_one_by_one(seed: int) -> None:
    generator = random.Random(seed)
    remote, local = [generator.randrange(1, 50)], [generator.randrange(1, 50)]
    for _ in range(generator.randrange(30)):
        is_next = generator.random() < 0.6
        remote.append(remote[-1] + 1 if is_next else generator.randrange(1, 50))
        local.append(local[-1] + 1 if is_next else generator.randrange(1, 50))
    runs = merge_runs(as_blocks(remote), as_blocks(local))
    assert count_runs(as_blocks(remote), as_blocks(local)) == len(runs[0])
    assert list(zip(*(part.tolist() for part in runs), strict=True)) == merge_runs_one_by_one(remote, local)
