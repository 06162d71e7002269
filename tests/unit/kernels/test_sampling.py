"""The sampling ops: the noise itself, and thresholds against filters by sorting."""

import itertools
import math

import pytest
import torch

from kvrelay_kernels.sampling import apply_penalties, filter_thresholds, gumbel_argmax, noise_key
from kvrelay_kernels.sampling.noise import GOLDEN, MIX_1, MIX_2, as_int32
from kvrelay_kernels.sampling.reference import gumbel_noise

NO_FILTER = -math.inf


def draw(logits_RV: torch.Tensor, keys: list[tuple[int, int]], temperature: float = 1.0) -> list[int]:
    num_rows = len(keys)
    tokens_R = gumbel_argmax(
        logits_RV,
        torch.full((num_rows,), temperature),
        torch.full((num_rows,), NO_FILTER),
        torch.tensor(keys, dtype=torch.int32),
    )
    chosen: list[int] = tokens_R.tolist()
    return chosen


def noise_by_hand(token: int, low: int, high: int) -> float:
    """The definition of `kvrelay_kernels.sampling.noise` in Python's own integers and floats."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * MIX_1 & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * MIX_2 & 0xFFFFFFFF
        return x ^ (x >> 16)

    bits = mix(mix((token * GOLDEN + low) & 0xFFFFFFFF) ^ (high & 0xFFFFFFFF)) & 0x7FFFFFFF
    return -math.log(-math.log1p(-(bits + 0.5) / 2**31))


@pytest.mark.parametrize("key", [(0, 0), (-1, 1), noise_key(7, 1, 2), noise_key(2**64 - 1, 3, 10**6)])
def test_noise_follows_its_definition(key: tuple[int, int]) -> None:
    tokens = torch.tensor([0, 1, 2, 77, 31999, 151935, 2**31 - 1], dtype=torch.int32)
    expected = [noise_by_hand(token, *key) for token in tokens.tolist()]
    torch.testing.assert_close(gumbel_noise(tokens, *key), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_noise_is_pinned() -> None:
    # Another value breaks migrations between releases: it needs a version on the wire.
    assert noise_key(1, 2, 3, 4) == (-348337413, -715338422)
    assert as_int32(2**32 - 1) == -1


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.arange(200_000, dtype=torch.int32), *noise_key(3, 0, 0)).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    # Kolmogorov-Smirnov against exp(-exp(-x)).
    below = torch.exp(-torch.exp(-noise.sort().values))
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert (below - steps).abs().max().item() < 1.95 / math.sqrt(len(noise))


def test_keys_differ_in_every_argument() -> None:
    keys = {noise_key(*arguments) for arguments in itertools.product(range(7), repeat=4)}
    assert len({low for low, _ in keys}) == len({high for _, high in keys}) == 7**4


def test_neighbouring_keys_give_uncorrelated_noise() -> None:
    tokens = torch.arange(20_000, dtype=torch.int32)
    rows = [gumbel_noise(tokens, *noise_key(5, choice, position)) for choice in (0, 1) for position in (0, 1, 2)]
    correlation = torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows), dtype=torch.float64)
    assert correlation.abs().max().item() < 4 / math.sqrt(len(tokens))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    num_draws = 5000
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.5])
    keys = [noise_key(11, 0, position) for position in range(num_draws)]
    counts = torch.bincount(torch.tensor(draw(logits_V.repeat(num_draws, 1), keys, temperature)), minlength=8)
    expected = (logits_V / temperature).double().softmax(-1) * num_draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 24.32  # 7 degrees of freedom, p = 0.001; the seeds are fixed


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits_RV = torch.randn(6, 500)
    keys = [noise_key(row, 0, 9) for row in range(6)]
    together = draw(logits_RV, keys)
    assert together == [draw(logits_RV[row : row + 1], keys[row : row + 1])[0] for row in range(6)]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw(logits_RV, [(1, 2), (3, 4)], temperature=0.0) == [1, 0]


def test_tokens_under_the_threshold_are_never_drawn() -> None:
    logits_V = torch.tensor([1.0, 1.1, 0.9, 1.0])
    keys = torch.tensor([noise_key(0, 0, position) for position in range(300)], dtype=torch.int32)
    tokens = gumbel_argmax(logits_V.repeat(300, 1), torch.full((300,), 5.0), torch.full((300,), 1.0), keys)
    assert set(tokens.tolist()) == {0, 1, 3}


def thresholds(
    logits_V: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> float:
    threshold_R = filter_thresholds(
        logits_V.unsqueeze(0),
        torch.tensor([temperature]),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p], dtype=torch.float32),
        torch.tensor([min_p], dtype=torch.float32),
    )
    return float(threshold_R)


def test_no_filter_leaves_everything_in() -> None:
    assert thresholds(torch.randn(50)) == thresholds(torch.randn(50), top_k=50) == NO_FILTER


@pytest.mark.parametrize("top_k", [1, 7, 49])
def test_top_k_is_the_kth_largest(top_k: int) -> None:
    logits_V = torch.randn(50)
    assert thresholds(logits_V, top_k=top_k) == logits_V.sort(descending=True).values[top_k - 1].item()


def nucleus_by_sorting(logits_V: torch.Tensor, temperature: float, top_p: float) -> float:
    ordered_V = logits_V.sort(descending=True).values
    probs_V = (ordered_V.double() / temperature).softmax(-1)
    num_kept = max(1, int((probs_V.cumsum(-1) - probs_V < top_p).sum()))
    return ordered_V[num_kept - 1].item()


@pytest.mark.parametrize("vocab_size", [3, 1024, 20_000])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.02, 1.0, 8.0])
def test_top_p_equals_a_sort(vocab_size: int, top_p: float, spread: float) -> None:
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    logits_V[::5] = -math.inf
    threshold = thresholds(logits_V, temperature=0.7, top_p=top_p)
    probs_V = (logits_V.double() / 0.7).softmax(-1)
    kept = probs_V[logits_V >= threshold].sum().item()
    expected = probs_V[logits_V >= nucleus_by_sorting(logits_V, 0.7, top_p)].sum().item()
    # Sums of float32 may place the border one token aside.
    assert kept == pytest.approx(expected, abs=1e-4)
    assert threshold in logits_V


def test_top_p_of_equal_logits_keeps_them_together() -> None:
    assert thresholds(torch.zeros(5000), top_p=0.3) == 0.0


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert thresholds(logits_V, top_k=2, top_p=0.5) == pytest.approx(math.log(0.4))
    assert thresholds(logits_V, top_p=0.5) == pytest.approx(math.log(0.3))


def test_min_p_is_relative_to_the_largest() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    threshold = thresholds(logits_V, min_p=0.4)
    assert (logits_V >= threshold).tolist() == [True, True, False, False]
    # A temperature flattens the probabilities: sqrt(0.15 / 0.5) > 0.4.
    assert (logits_V >= thresholds(logits_V, temperature=2.0, min_p=0.4)).tolist() == [True, True, True, False]


def test_apply_penalties_changes_the_named_logits_in_order() -> None:
    logits_RV = torch.tensor([[1.0, -1.0, 0.5], [2.0, 2.0, 2.0]])
    apply_penalties(
        logits_RV,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 1, 2]),
        torch.tensor([[1.0, 0.0, -3.0], [2.0, 2.0, 2.0], [0.25, 0.0, math.inf]]),
    )
    assert logits_RV.tolist() == [[0.75, -2.0, 0.5], [2.0, 2.0, -math.inf]]
