"""Paged attention on the CPU against attention written out."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvrelay_kernels.attention import AttentionBatch, paged_attention
from kvrelay_kernels.attention import reference as attention_reference


@dataclass
class Problem:
    q_NHD: Tensor
    pool: Tensor
    batch: AttentionBatch
    keys: list[Tensor]
    values: list[Tensor]

    def attend(self) -> Tensor:
        return paged_attention(self.q_NHD, self.pool[:, 1], self.batch, self.q_NHD.shape[-1] ** -0.5)

    def expected(self) -> Tensor:
        """In float64, with every score written out, one sequence after the other."""
        outputs = []
        group = self.q_NHD.shape[1] // self.pool.shape[3]
        for sequence, context_len in enumerate(self.batch.context_lens):
            start, end = self.batch.query_starts[sequence : sequence + 2]
            k_SHD = self.keys[sequence].repeat_interleave(group, dim=1).double()
            v_SHD = self.values[sequence].repeat_interleave(group, dim=1).double()
            scores_HQS = torch.einsum("qhd,shd->hqs", self.q_NHD[start:end].double(), k_SHD)
            positions_Q = torch.arange(context_len - (end - start), context_len)
            is_later_QS = torch.arange(context_len) > positions_Q.unsqueeze(1)
            weights_HQS = (scores_HQS * self.q_NHD.shape[-1] ** -0.5).masked_fill(is_later_QS, -math.inf).softmax(-1)
            outputs.append(torch.einsum("hqs,shd->qhd", weights_HQS, v_SHD))
        return torch.cat(outputs).float()


def make_problem(
    sequences: list[tuple[int, int]], *, block_tokens: int, kv_heads: int, group: int, head_dim: int, seed: int
) -> Problem:
    """`sequences` are (query length, context length); whatever no token wrote is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-context_len // block_tokens) for _, context_len in sequences]
    pool = torch.full((sum(num_blocks) + 1, 3, 2, kv_heads, block_tokens, head_dim), float("nan"))
    order = iter((torch.randperm(sum(num_blocks), generator=generator) + 1).tolist())
    tables_BM = torch.zeros(len(sequences), max(num_blocks) + 2, dtype=torch.int32)
    keys, values = [], []
    for sequence, (_, context_len) in enumerate(sequences):
        blocks = torch.tensor(list(itertools.islice(order, num_blocks[sequence])))
        tables_BM[sequence, : len(blocks)] = blocks
        k_SKD, v_SKD = torch.randn(2, context_len, kv_heads, head_dim, generator=generator)
        positions = torch.arange(context_len)
        pool[blocks[positions // block_tokens], 1, 0, :, positions % block_tokens] = k_SKD
        pool[blocks[positions // block_tokens], 1, 1, :, positions % block_tokens] = v_SKD
        keys.append(k_SKD)
        values.append(v_SKD)
    starts = list(itertools.accumulate((query_len for query_len, _ in sequences), initial=0))
    q_NHD = torch.randn(starts[-1], kv_heads * group, head_dim, generator=generator)
    batch = AttentionBatch.build(starts, [context_len for _, context_len in sequences], tables_BM)
    return Problem(q_NHD, pool, batch, keys, values)


def draw_sequences(rng: random.Random) -> list[tuple[int, int]]:
    kind = rng.choice(["decode", "prompts", "mixed"])
    context_lens = [rng.randint(1, 150) for _ in range(rng.randint(1, 5))]
    if kind == "decode":
        return [(1, context_len) for context_len in context_lens]
    if kind == "prompts":
        return [(context_len, context_len) for context_len in context_lens]
    return [(rng.choice([1, rng.randint(1, context_len)]), context_len) for context_len in context_lens]


@pytest.mark.parametrize("seed", range(40))
def test_any_batch_equals_attention_written_out(seed: int) -> None:
    rng = random.Random(seed)
    problem = make_problem(
        draw_sequences(rng),
        block_tokens=rng.choice([1, 2, 4, 8, 16, 32, 64, 128]),
        kv_heads=rng.choice([1, 2, 3]),
        group=rng.choice([1, 2, 3, 4, 8]),
        head_dim=rng.choice([16, 32, 64, 80, 128]),
        seed=seed,
    )
    torch.testing.assert_close(problem.attend(), problem.expected(), rtol=1e-5, atol=1e-5)


def test_long_contexts_are_computed_in_several_groups() -> None:
    sequences = [(1, 1100), (1, 60), (1, 1030), (1, 1000), (1, 61)]
    problem = make_problem(sequences, block_tokens=64, kv_heads=4, group=2, head_dim=64, seed=3)
    torch.testing.assert_close(problem.attend(), problem.expected(), rtol=1e-5, atol=1e-5)
    plan = problem.batch.plan(attention_reference.ReferencePlan, lambda: pytest.fail("the plan is not kept"))
    assert len(plan.decode_groups) > 1


def test_a_row_gives_the_same_alone_and_in_a_batch() -> None:
    sequences = [(1, 70), (3, 20), (1, 129), (1, 5)]
    problem = make_problem(sequences, block_tokens=16, kv_heads=2, group=2, head_dim=32, seed=5)
    together = problem.attend()
    for sequence, (query_len, context_len) in enumerate(sequences):
        start = problem.batch.query_starts[sequence]
        alone = AttentionBatch.build(
            [0, query_len], [context_len], problem.batch.block_tables_BM[sequence : sequence + 1]
        )
        out = paged_attention(problem.q_NHD[start : start + query_len], problem.pool[:, 1], alone, 32**-0.5)
        torch.testing.assert_close(out, together[start : start + query_len], rtol=1e-6, atol=1e-6)


def test_a_missing_block_changes_the_answer() -> None:
    problem = make_problem([(1, 40)], block_tokens=8, kv_heads=1, group=2, head_dim=16, seed=7)
    expected = problem.attend()
    problem.pool[problem.batch.block_tables_BM[0, 2]] = 0.0
    assert not torch.allclose(problem.attend(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    problem = make_problem([(1, 70), (9, 40), (1, 3)], block_tokens=16, kv_heads=2, group=2, head_dim=32, seed=9)
    expected = problem.expected()
    problem.q_NHD, problem.pool = problem.q_NHD.to(dtype), problem.pool.to(dtype)
    torch.testing.assert_close(problem.attend().float(), expected, rtol=3e-2, atol=3e-2)


def test_views_of_a_projection_are_taken_as_queries() -> None:
    problem = make_problem([(1, 30), (4, 9)], block_tokens=8, kv_heads=2, group=2, head_dim=16, seed=11)
    expected = problem.attend()
    wide = torch.randn(5, 8, 16)
    wide[:, 1:5] = problem.q_NHD
    problem.q_NHD = wide[:, 1:5]
    torch.testing.assert_close(problem.attend(), expected, rtol=1e-6, atol=1e-6)
