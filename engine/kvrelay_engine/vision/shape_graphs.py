"""Replays a computation on a GPU as one CUDA graph where inputs of the same shapes come again.

A tower posts some 500 kernels, which takes the CPU longer than it takes a GPU to compute a picture or two; a graph is
posted as one. Shapes are captured when they come a second time, up to a number that bounds the memory; all others, and
everything on a CPU, are computed as ever. It knows nothing of towers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 16_384  # of the first input: with more the GPU is the slower one
MAX_GRAPHS = 32

Compute = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output


class ShapeGraphs:
    """Of one caller on one stream: its graphs share their memory, and an output is good until the next call."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None  # of the graphs' memory

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, compute: Compute, *inputs: Tensor) -> Tensor:
        """`compute(*inputs)`. Calls with the same key have inputs of the same shapes and differ in nothing else that
        `compute` looks at."""
        if not inputs[0].is_cuda or len(inputs[0]) > MAX_ROWS:
            return compute(*inputs)
        captured = self._captured.get(key)
        if captured is not None:
            return captured.replay(inputs)
        if key in self._seen and len(self._captured) < MAX_GRAPHS:
            self._captured[key] = self._capture(compute, inputs)
            return self._captured[key].replay(inputs)
        if len(self._seen) < 64 * MAX_GRAPHS:
            self._seen.add(key)
        return compute(*inputs)

    def _capture(self, compute: Compute, inputs: tuple[Tensor, ...]) -> _Captured:
        own = tuple(given.clone() for given in inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads pin memory meanwhile, which is no business of the graph's.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute(*own)
        self._pool = graph.pool()
        return _Captured(graph, own, output)
