"""Runs a loaded model over the paged pool: the engine's `Runner`.

A step is: lay the batch out (`step_builder.py`), run the layers, project the rows that want logits. It knows
nothing of requests, scheduling or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay_core.errors import ConfigError
from kvrelay_engine.loader import LoadedModel
from kvrelay_engine.runner import BatchRow
from kvrelay_engine.step_builder import StepBuilder
from kvrelay_kernels.kv_copy import copy_blocks
from kvrelay_transfer.layout import KvLayout


class ModelRunner:
    def __init__(self, loaded: LoadedModel, pool: Tensor, layout: KvLayout) -> None:
        """`pool` [num_blocks, layers, 2, K, T, D] has the layout `loaded.kv_layout(...)` and lies on its device."""
        expected = loaded.kv_layout(layout.block_tokens, layout.hash_unit_tokens)
        if layout != expected:
            raise ConfigError(f"the KV pool's layout {layout} does not fit the model, which needs {expected}")
        assert tuple(pool.shape[1:]) == layout.shape, "the pool is not of its layout"
        self.vocab_size = loaded.config.vocab_size
        self._model = loaded.model
        self._pool = pool
        self._layer_pools = [pool[:, layer] for layer in range(layout.num_layers)]
        self._steps = StepBuilder(layout.block_tokens, loaded.device, media_see_ahead=loaded.config.media_see_ahead)

    def run(self, batch: Sequence[BatchRow]) -> Tensor:
        """See `runner.Runner.run`."""
        with torch.inference_mode():
            return self._model(self._steps.build(batch), self._layer_pools).float()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `runner.Runner.copy_blocks`."""
        if pairs:
            copy_blocks(self._pool, [source for source, _ in pairs], [destination for _, destination in pairs])
