"""Attention over the paged pool: the public function, dispatched by device."""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.attention import reference
from kvrelay_kernels.attention.batch import AttentionBatch


def paged_attention(q_NHD: Tensor, layer_pool: Tensor, batch: AttentionBatch, scale: float, window: int = 0) -> Tensor:
    """Attention of every query token over its sequence's context in the pool, up to itself: [N, H, D].

    Of a `window` of more than 0, it sees the last `window` tokens up to itself; where `batch.last_visible` says so, it
    sees past itself.

    `layer_pool` [num_blocks, 2, K, T, D] is `pool[:, layer]`; the new tokens' keys and values are written
    already. H is a multiple of K. Single tokens (decode) and chunks (prefill) may be mixed in a batch. Slots past
    a context or before every window, and padded block-table entries, are never used, whatever they hold.
    """
    if q_NHD.is_cuda:
        from kvrelay_kernels.attention import kernel

        return kernel.paged_attention(q_NHD, layer_pool, batch, scale, window)
    return reference.paged_attention(q_NHD, layer_pool, batch, scale, window)
