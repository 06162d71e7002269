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
    window: int = 0

    def attend(self) -> Tensor:
        scale = self.q_NHD.shape[-1] ** -0.5
        return paged_attention(self.q_NHD, self.pool[:, 1], self.batch, scale, self.window)

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
            last_Q = positions_Q
            if self.batch.last_visible is not None:
                last_Q = torch.tensor(self.batch.last_visible[start:end])
            is_hidden_QS = torch.arange(context_len) > last_Q.unsqueeze(1)
            if self.window:
                is_hidden_QS |= torch.arange(context_len) <= positions_Q.unsqueeze(1) - self.window
            weights_HQS = (scores_HQS * self.q_NHD.shape[-1] ** -0.5).masked_fill(is_hidden_QS, -math.inf).softmax(-1)
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


def draw_last_visible(rng: random.Random, sequences: list[tuple[int, int]]) -> list[int]:
    """Some stretches of each chunk see all of themselves."""
    last_visible = []
    for query_len, context_len in sequences:
        position = context_len - query_len
        while position < context_len:
            end = min(context_len, position + rng.choice([1, 1, rng.randint(1, 60)]))
            is_image = rng.random() < 0.5
            last_visible += [end - 1 if is_image else token for token in range(position, end)]
            position = end
    return last_visible


def forget_before_windows(problem: Problem) -> None:
    """Whole blocks that no query sees any more may hold anything."""
    block_tokens = problem.pool.shape[4]
    for sequence, context_len in enumerate(problem.batch.context_lens):
        first_position = context_len - problem.batch.query_len(sequence)
        num_unseen = max(0, first_position + 1 - problem.window) // block_tokens
        problem.pool[problem.batch.block_tables_BM[sequence, :num_unseen].long()] = float("nan")
        problem.batch.block_tables_BM[sequence, :num_unseen] = 0


@pytest.mark.parametrize("seed", range(40))
def test_windows_and_images_equal_attention_written_out(seed: int) -> None:
    rng = random.Random(seed)
    sequences = draw_sequences(rng)
    problem = make_problem(
        sequences,
        block_tokens=rng.choice([1, 4, 16, 64, 128]),
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 3, 4]),
        head_dim=rng.choice([16, 80]),
        seed=seed,
    )
    last_visible = draw_last_visible(rng, sequences) if seed % 3 else None
    starts, lens, tables_BM = problem.batch.query_starts, problem.batch.context_lens, problem.batch.block_tables_BM
    problem.batch = AttentionBatch.build(starts, lens, tables_BM, last_visible)
    problem.window = rng.choice([1, 5, 16, 40, 1000]) if seed % 4 else 0
    expected = problem.expected()
    if problem.window:
        forget_before_windows(problem)
    torch.testing.assert_close(problem.attend(), expected, rtol=1e-5, atol=1e-5)


def test_layers_with_and_without_a_window_share_a_batch() -> None:
    problem = make_problem([(1, 70), (9, 40)], block_tokens=16, kv_heads=2, group=2, head_dim=32, seed=2)
    for window in (0, 8, 0, 20, 8):
        problem.window = window
        torch.testing.assert_close(problem.attend(), problem.expected(), rtol=1e-5, atol=1e-5)


def test_a_window_of_the_whole_context_gives_the_same_bits_as_none() -> None:
    problem = make_problem([(1, 70), (40, 40), (1, 3)], block_tokens=16, kv_heads=2, group=2, head_dim=32, seed=4)
    without = problem.attend()
    problem.window = 70
    assert torch.equal(problem.attend(), without)


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
