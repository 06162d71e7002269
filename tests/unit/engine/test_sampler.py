"""The sampler against naive rules, and against the logits processors of `transformers`."""

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvrelay_core.request import SamplingParams
from kvrelay_engine.logit_adjustments import PromptTokens
from kvrelay_engine.sampler import SampledToken, Sampler, SamplingRow

VOCAB = 60


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_row(
    *,
    logits_row: int = 0,
    seed: int = 1,
    choice: int = 0,
    position: int | None = None,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
    **params: Any,
) -> SamplingRow:
    return SamplingRow(
        logits_row=logits_row,
        params=SamplingParams(**{"temperature": 0.0, **params}),
        seed=seed,
        choice=choice,
        position=len(output) if position is None else position,
        prompt=PromptTokens(prompt),
        output=output,
        eos_token_ids=eos,
    )


def sample(logits_RV: torch.Tensor, rows: list[SamplingRow]) -> list[SampledToken]:
    """Every row draws."""
    sampled = Sampler().sample(logits_RV, rows)
    drawn = [token for token in sampled if token is not None]
    assert len(drawn) == len(rows)
    return drawn


def sample_one(logits_V: torch.Tensor, row: SamplingRow) -> int:
    return sample(logits_V.unsqueeze(0), [row])[0].token_id


def sample_many(logits_V: torch.Tensor, num_draws: int, **row: Any) -> list[int]:
    rows = [make_row(position=position, **row) for position in range(num_draws)]
    return [token.token_id for token in sample(logits_V.unsqueeze(0), rows)]


def expect_distribution(drawn: list[int], probs_V: torch.Tensor) -> None:
    """Chi-square over the tokens that can be drawn; the others are never."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probs_V))
    possible = probs_V > 0
    assert counts[~possible].sum() == 0
    expected = probs_V[possible].double() * len(drawn)
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    # A bound of about p = 0.001 (Wilson and Hilferty); seeds are fixed.
    assert chi_square <= freedom * (1 - 2 / (9 * max(1, freedom)) + 3.09 * math.sqrt(2 / (9 * max(1, freedom)))) ** 3


# --- greedy ---------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits_RV = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    rows = [make_row(logits_row=index) for index in range(3)]
    assert [token.token_id for token in sample(logits_RV, rows)] == [1, 0, 2]


def test_rows_pick_their_logits_in_any_order_and_may_share_them() -> None:
    logits_RV = torch.eye(4)
    rows = [make_row(logits_row=index) for index in (2, 0, 0, 3)]
    assert [token.token_id for token in sample(logits_RV, rows)] == [2, 0, 0, 3]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


def test_a_vanishing_temperature_is_greedy() -> None:
    logits_V = torch.randn(VOCAB)
    assert sample_one(logits_V, make_row(temperature=1e-30)) == int(logits_V.argmax())


# --- penalties, bias and bans -----------------------------------------------------------------------------------


def naive_adjusted(logits: list[float], row: SamplingRow) -> list[float]:
    params, counts = row.params, Counter(row.output)
    adjusted = []
    for token, given in enumerate(logits):
        logit = given + params.logit_bias.get(token, 0.0)
        if token in row.prompt.tokens or token in row.output:
            logit = logit * params.repetition_penalty if logit < 0 else logit / params.repetition_penalty
        logit -= counts[token] * params.frequency_penalty + (params.presence_penalty if counts[token] else 0.0)
        if row.position < params.min_tokens and token in (*row.eos_token_ids, *params.stop_token_ids):
            logit = -math.inf
        adjusted.append(logit)
    return adjusted


@pytest.mark.parametrize("seed", range(30))
def test_adjustments_equal_the_naive_rules(seed: int) -> None:
    rng = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(0, most)))

    rows = [
        make_row(
            logits_row=index,
            prompt=tokens(20),
            output=tokens(20),
            eos=tokens(2),
            stop_token_ids=tokens(2),
            min_tokens=rng.choice([0, 30]),
            repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.5, -0.3]),
            presence_penalty=rng.choice([0.0, 0.7]),
            logit_bias={token: rng.uniform(-5, 5) for token in tokens(3)},
        )
        for index in range(4)
    ]
    logits_RV = torch.randn(4, VOCAB)
    before_RV = logits_RV.clone()
    sampled = sample(logits_RV, rows)
    assert torch.equal(logits_RV, before_RV)
    for row, logits, token in zip(rows, logits_RV.tolist(), sampled, strict=True):
        adjusted = naive_adjusted(logits, row)
        assert token.token_id == max(range(VOCAB), key=adjusted.__getitem__)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits_V = torch.randn(VOCAB)
    prompt, output = (3, 5, 5, 9), (7, 3)
    processed = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits_V.unsqueeze(0).clone())
    drawn = sample_many(logits_V, 3000, prompt=prompt, output=output, temperature=1.0, repetition_penalty=1.7, top_k=12)
    expect_distribution(drawn, TopKLogitsWarper(12)(None, processed)[0].softmax(-1))


def test_the_bias_comes_before_the_penalties() -> None:
    # 1 + 3 = 4, halved to 2; the other order would give 3.5 and win.
    logits_V = torch.tensor([1.0, 3.0, 0.0])
    row = make_row(prompt=(0,), logit_bias={0: 3.0}, repetition_penalty=2.0)
    assert sample_one(logits_V, row) == 1


def test_min_tokens_bans_eos_and_stop_tokens_until_it_is_reached() -> None:
    logits_V = torch.tensor([5.0, 4.0, 3.0, 0.0])
    for position, expected in enumerate([2, 2, 0]):
        assert (
            sample_one(logits_V, make_row(position=position, eos=(0,), stop_token_ids=(1,), min_tokens=2)) == expected
        )


def test_a_ban_outweighs_a_bias() -> None:
    row = make_row(eos=(0,), min_tokens=1, logit_bias={0: 100.0})
    assert sample_one(torch.tensor([5.0, 1.0]), row) == 1


def test_a_bias_of_minus_infinity_bans() -> None:
    assert sample_one(torch.tensor([5.0, 1.0]), make_row(logit_bias={0: -math.inf})) == 1


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    row = make_row(logit_bias={99: 50.0}, stop_token_ids=(77,), eos=(1000,), min_tokens=3, prompt=(500,))
    assert sample_one(torch.tensor([0.0, 1.0]), replace(row, output=(600,))) == 1


# --- the draw -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_warpers_of_transformers(params: dict[str, Any]) -> None:
    logits_V = torch.randn(16).mul(1.5)
    warped_V = TemperatureLogitsWarper(params["temperature"])(None, logits_V.unsqueeze(0))
    if "top_k" in params:
        warped_V = TopKLogitsWarper(min(16, params["top_k"]))(None, warped_V)
    if "top_p" in params:
        warped_V = TopPLogitsWarper(params["top_p"])(None, warped_V)
    if "min_p" in params:
        warped_V = MinPLogitsWarper(params["min_p"])(None, warped_V)
    drawn = sample_many(logits_V, 4000, **params)
    assert len(set(drawn)) > 1
    expect_distribution(drawn, warped_V[0].softmax(-1))


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_filters_leave_the_most_likely_token(params: dict[str, Any]) -> None:
    logits_V = torch.randn(VOCAB)
    assert set(sample_many(logits_V, 50, temperature=3.0, **params)) == {int(logits_V.argmax())}


def test_the_same_row_draws_the_same_token_in_any_batch() -> None:
    logits_RV = torch.randn(8, 300)
    rng = random.Random(3)
    rows = [
        make_row(
            logits_row=index,
            seed=index,
            choice=index % 3,
            position=index * 7,
            temperature=rng.choice([0.0, 0.7, 1.4]),
            top_k=rng.choice([0, 11]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.01]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            output=(1, 2, 3),
        )
        for index in range(8)
    ]
    together = [token.token_id for token in sample(logits_RV, rows)]
    order = rng.sample(range(8), 8)
    shuffled = [token.token_id for token in sample(logits_RV, [rows[index] for index in order])]
    alone = [sample_one(logits_RV[index], replace(row, logits_row=0)) for index, row in enumerate(rows)]
    assert [together[index] for index in order] == shuffled
    assert together == alone


@pytest.mark.parametrize("field", ["seed", "choice", "position", "draw"])
def test_noise_depends_on(field: str) -> None:
    logits_V = torch.zeros(50_000)
    row = make_row(temperature=1.0)
    changes: list[dict[str, Any]] = [{field: value} for value in range(6)]
    tokens = {sample_one(logits_V, replace(row, **change)) for change in changes}
    assert len(tokens) == 6


def test_noise_depends_on_nothing_else() -> None:
    logits_V = torch.zeros(1000)
    first = sample_one(logits_V, make_row(temperature=1.0, position=4, prompt=(1, 2), output=(3,)))
    assert sample_one(logits_V, make_row(temperature=1.0, position=4, prompt=(9,), output=(5, 6, 7, 8))) == first


def test_choices_are_independent() -> None:
    probs_V = torch.tensor([0.5, 0.3, 0.2])
    drawn = [sample_many(probs_V.log(), 3000, temperature=1.0, choice=choice) for choice in (0, 1)]
    pairs = [first * 3 + second for first, second in zip(*drawn, strict=True)]
    expect_distribution(pairs, torch.outer(probs_V, probs_V).view(-1))


# --- logits that are not numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 4, "min_p": 0.1},
        {"repetition_penalty": 1.2, "logprobs": 3},
    ],
)
@pytest.mark.parametrize("num_bad", [1, VOCAB])
def test_a_row_with_a_nan_draws_nothing_and_the_others_do(params: dict[str, Any], num_bad: int) -> None:
    logits_RV = torch.randn(3, VOCAB)
    rows = [make_row(logits_row=index, prompt=(1, 2), **params) for index in range(3)]
    healthy = sample(logits_RV, rows)
    logits_RV[1, :num_bad] = math.nan
    assert Sampler().sample(logits_RV, rows) == [healthy[0], None, healthy[2]]


# --- logprobs ---------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model() -> None:
    logits_V = torch.randn(VOCAB)
    row = make_row(temperature=2.0, top_k=3, logit_bias={4: 9.0}, logprobs=5)
    token = sample(logits_V.unsqueeze(0), [row])[0]
    expected_V = logits_V.log_softmax(-1)
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(expected_V[token.token_id].item(), abs=1e-6)
    best = expected_V.topk(5)
    assert [token_id for token_id, _ in token.logprobs.top] == best.indices.tolist()
    assert [logprob for _, logprob in token.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_each_row_gets_the_logprobs_that_it_asked_for() -> None:
    logits_RV = torch.randn(4, VOCAB)
    wanted = [None, 0, 2, VOCAB + 5]
    rows = [make_row(logits_row=index, logprobs=logprobs) for index, logprobs in enumerate(wanted)]
    sampled = sample(logits_RV, rows)
    assert sampled[0].logprobs is None
    lengths = [len(token.logprobs.top) for token in sampled[1:] if token.logprobs is not None]
    assert lengths == [0, 2, VOCAB]
    for index, token in enumerate(sampled[1:], start=1):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(logits_RV[index].log_softmax(-1).max().item(), abs=1e-6)


def test_equally_likely_tokens_are_listed_by_id() -> None:
    row = make_row(logprobs=3)
    token = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [row])[0]
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 2, 3]


def test_every_field_of_the_parameters_matters_or_is_the_engines() -> None:
    """A new field of SamplingParams must be handled here or listed as somebody else's."""
    engines = {"max_tokens", "ignore_eos"}
    handled = {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
        "min_tokens", "stop_token_ids", "logprobs", "logit_bias",
    }  # fmt: skip
    assert set(SamplingParams.__struct_fields__) == engines | handled
