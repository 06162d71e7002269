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
    def __init__(self, loaded: LoadedModel, pools: Sequence[Tensor], layouts: Sequence[KvLayout]) -> None:
        """`pools` [num_blocks, layers, 2, K, T, D], one for each KV group, have the layouts `loaded.kv_layouts(...)`
        and lie on its device."""
        first = layouts[0]
        expected = loaded.kv_layouts(first.block_tokens, first.hash_unit_tokens)
        if tuple(layouts) != expected:
            raise ConfigError(f"the KV pools' layouts {layouts} do not fit the model, which needs {expected}")
        for pool, layout in zip(pools, layouts, strict=True):
            assert tuple(pool.shape[1:]) == layout.shape, "the pool is not of its layout"
        self.vocab_size = loaded.config.vocab_size
        self._model = loaded.model
        self._pools = tuple(pools)
        self._layer_pools = _by_layer(loaded.config.kv_groups, pools)
        self._steps = StepBuilder(
            first.block_tokens,
            loaded.device,
            media_see_ahead=loaded.config.media_see_ahead,
            has_sliding_group=len(layouts) > 1,
        )

    def run(self, batch: Sequence[BatchRow]) -> Tensor:
        """See `runner.Runner.run`."""
        with torch.inference_mode():
            return self._model(self._steps.build(batch), self._layer_pools).float()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], group: int = 0) -> None:
        """See `runner.Runner.copy_blocks`."""
        if pairs:
            copy_blocks(self._pools[group], [source for source, _ in pairs], [destination for _, destination in pairs])


def _by_layer(groups: Sequence[Sequence[int]], pools: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's part of its group's pool, [num_blocks, 2, K, T, D]."""
    of_layer = {
        layer: pool[:, index] for layers, pool in zip(groups, pools, strict=True) for index, layer in enumerate(layers)
    }
    return [of_layer[layer] for layer in sorted(of_layer)]
