"""Work like that of a decode step of Llama-3.1-8B on one GPU, and how much slower it gets while something else runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch

LAYERS = 32
HIDDEN = 4096
# Columns of the four matrix products of a layer, as (in, out).
PRODUCTS = ((HIDDEN, 6144), (HIDDEN, HIDDEN), (HIDDEN, 28672), (14336, HIDDEN))
BATCH = 32
KV_BYTES_PER_LAYER = BATCH * 1024 * 4096  # 1024 tokens of context each, 4 KiB a token and layer


class DecodeStep:
    """All weights and all KV are read once, as in a step of 32 sequences; captured as one CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            make = torch.Generator(device).manual_seed(1)
            weights = [
                [torch.randn(shape, dtype=torch.bfloat16, device=device, generator=make) for shape in PRODUCTS]
                for _ in range(LAYERS)
            ]
            inputs = {
                width: torch.randn(BATCH, width, dtype=torch.bfloat16, device=device, generator=make)
                for width in {shape[0] for shape in PRODUCTS}
            }
            kv = torch.randn(LAYERS, KV_BYTES_PER_LAYER // 2 // 128, 128, device=device, generator=make).bfloat16()
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):
                self._run(weights, inputs, kv)
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._run(weights, inputs, kv)
        self._kept = (weights, inputs, kv)

    def _run(
        self, weights: list[list[torch.Tensor]], inputs: dict[int, torch.Tensor], kv: torch.Tensor
    ) -> list[torch.Tensor]:
        results = []
        for layer, matrices in enumerate(weights):
            results += [inputs[matrix.shape[0]] @ matrix for matrix in matrices]
            results.append(kv[layer].sum(dtype=torch.float32))
        return results

    def times_ms(self, num_steps: int, between: Callable[[], None]) -> list[float]:
        """Of each step on the GPU; `between` is called after each launch, as a step loop would."""
        with torch.cuda.device(self._device):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]  # type: ignore[no-untyped-call]
            events[0].record()
            for index, event in enumerate(events[1:]):
                self._graph.replay()
                event.record()
                between()
                if index:
                    events[index - 1].synchronize()
            torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def median_ms(self, num_steps: int, between: Callable[[], None] = lambda: None) -> float:
        return statistics.median(self.times_ms(num_steps, between))

    def mean_ms(self, num_steps: int, between: Callable[[], None] = lambda: None) -> float:
        return statistics.mean(self.times_ms(num_steps, between))
