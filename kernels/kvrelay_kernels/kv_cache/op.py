"""Writing keys and values into the pool: the public function, dispatched by device."""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.kv_cache import reference


def write_kv(k_NKD: Tensor, v_NKD: Tensor, layer_pool: Tensor, slots_N: Tensor) -> None:
    """Stores one key and one value per token and head, in place.

    `layer_pool` is `pool[:, layer]` of a pool [num_blocks, layers, 2, K, T, D] whose last three dimensions are
    contiguous: [num_blocks, 2, K, T, D]. `slots_N` (int64) holds block * T + offset; slots are distinct.
    """
    if k_NKD.is_cuda:
        from kvrelay_kernels.kv_cache import kernel

        return kernel.write_kv(k_NKD, v_NKD, layer_pool, slots_N)
    return reference.write_kv(k_NKD, v_NKD, layer_pool, slots_N)
