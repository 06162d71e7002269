"""Writes into the pool and whole-block copies touch what they name, and nothing else."""

import random

import pytest
import torch

from kvrelay_kernels.kv_cache import write_kv
from kvrelay_kernels.kv_copy import copy_blocks, gather_blocks, scatter_blocks


@pytest.mark.parametrize("seed", range(10))
def test_write_kv_fills_exactly_its_slots(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, layers, heads, head_dim = rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 4), rng.choice([16, 80])
    block_tokens = rng.choice([1, 2, 4, 16])
    layer = rng.randrange(layers)
    pool = torch.randn(num_blocks, layers, 2, heads, block_tokens, head_dim)
    expected = pool.clone()
    slots = rng.sample(range(num_blocks * block_tokens), rng.randint(0, num_blocks * block_tokens))
    kv = torch.randn(len(slots), 3 * heads, head_dim)  # keys and values as slices of a projection
    k_NKD, v_NKD = kv[:, heads : 2 * heads], kv[:, 2 * heads :]
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, block_tokens)
        expected[block, layer, 0, :, offset] = k_NKD[token]
        expected[block, layer, 1, :, offset] = v_NKD[token]
    write_kv(k_NKD, v_NKD, pool[:, layer], torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_copy_gather_and_scatter(as_tensor: bool) -> None:
    def index(blocks: list[int]) -> list[int] | torch.Tensor:
        return torch.tensor(blocks) if as_tensor else blocks

    pool = torch.randn(7, 2, 2, 3, 4, 16)
    before = pool.clone()
    copy_blocks(pool, index([5, 1]), index([0, 6]))
    assert torch.equal(pool[[0, 6]], before[[5, 1]])
    assert torch.equal(pool[1:6], before[1:6])

    out = torch.empty(3, 2, 2, 3, 4, 16)
    gather_blocks(pool, index([4, 2, 4]), out)
    assert torch.equal(out, before[[4, 2, 4]])

    scatter_blocks(out[:2], pool, index([3, 1]))
    assert torch.equal(pool[[3, 1]], out[:2])
    assert torch.equal(pool[[2, 4, 5]], before[[2, 4, 5]])


def test_copying_nothing_is_fine() -> None:
    pool = torch.randn(3, 4)
    before = pool.clone()
    copy_blocks(pool, [], [])
    scatter_blocks(torch.empty(0, 4), pool, [])
    assert torch.equal(pool, before)
