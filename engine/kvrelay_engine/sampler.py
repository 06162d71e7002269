"""From logits to tokens: every field of `SamplingParams`, one row per choice.

The order is that of Hugging Face and vLLM: logit_bias, repetition penalty, frequency and presence penalties,
the ban of min_tokens, temperature, top-k, top-p, min-p, draw.

- The repetition penalty divides positive logits (multiplies negative ones) of every token of prompt and output.
- Frequency and presence penalties count tokens of the output only and are subtracted.
- Until `min_tokens` tokens are there, EOS and stop tokens cannot be drawn.
- Logprobs are those of the model: log-softmax of the logits as they came, before any of the above.
- Noise is a function of (seed, choice, position, draw) and the token id alone (`kvrelay_kernels.sampling.noise`),
  so a choice draws the same tokens in any batch and on any worker that computes the same logits.

A row of logits with a NaN in it draws nothing: what computed it went wrong, and any token would hide that.

Keeps no state between calls, and knows nothing of stop conditions: the engine judges the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrelay_core.request import SamplingParams, TokenLogprobs
from kvrelay_engine.logit_adjustments import PromptTokens, adjustments
from kvrelay_kernels.sampling import apply_penalties, filter_thresholds, gumbel_argmax, noise_key

# Below it the quotient of logit and temperature leaves nothing to chance, and soon overflows.
_GREEDY_BELOW = 1e-5


@dataclass(slots=True, frozen=True)
class SamplingRow:
    """One token to be drawn. Several choices may share a row of logits."""

    logits_row: int
    params: SamplingParams
    seed: int
    choice: int
    position: int  # number of generated tokens before this one
    prompt: PromptTokens
    output: Sequence[int]  # generated and committed tokens
    eos_token_ids: Sequence[int] = ()
    draw: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < _GREEDY_BELOW

    @property
    def is_banning(self) -> bool:
        return self.position < self.params.min_tokens

    @property
    def banned(self) -> set[int]:
        """Tokens that cannot be drawn yet."""
        return {*self.eos_token_ids, *self.params.stop_token_ids} if self.is_banning else set()

    @property
    def is_filtered(self) -> bool:
        return not self.is_greedy and (self.params.top_k > 0 or self.params.top_p < 1 or self.params.min_p > 0)

    @property
    def is_adjusted(self) -> bool:
        params = self.params
        return bool(
            self.is_banning
            or params.logit_bias
            or params.repetition_penalty != 1
            or params.frequency_penalty
            or params.presence_penalty
        )


@dataclass(slots=True, frozen=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Draws one token for every row. Rows do not influence each other."""

    def sample(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | None]:
        """Returns the tokens in the order of `rows`, None where the logits are not numbers.

        Leaves `logits_RV` (float32) as it is.
        """
        if not rows:
            return []
        row_logits_RV = _select_rows(logits_RV, rows)
        is_broken_R = row_logits_RV.amax(-1).isnan()  # the maximum of a row with a NaN is NaN
        row_logits_RV = row_logits_RV.masked_fill(is_broken_R.unsqueeze(1), 0.0)
        adjusted_RV = _adjust(row_logits_RV, rows)
        is_all_greedy = all(row.is_greedy for row in rows)
        chosen_R = adjusted_RV.argmax(-1) if is_all_greedy else _draw(adjusted_RV, rows)
        if all(row.params.logprobs is None for row in rows):
            sampled = [SampledToken(token_id) for token_id in chosen_R.tolist()]
        else:
            sampled = _with_logprobs(row_logits_RV, chosen_R, rows)
        return [None if broken else token for token, broken in zip(sampled, is_broken_R.tolist(), strict=True)]


def _select_rows(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    wanted = [row.logits_row for row in rows]
    if wanted == list(range(logits_RV.shape[0])):
        return logits_RV.contiguous()
    return logits_RV.index_select(0, torch.tensor(wanted, device=logits_RV.device))


def _adjust(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Applies logit_bias, penalties and bans to the tokens that they name, in a copy."""
    vocab_size = logits_RV.shape[1]
    of_rows = {
        index: adjustments(row.params, row.prompt, row.output, row.banned, vocab_size)
        for index, row in enumerate(rows)
        if row.is_adjusted
    }
    if not of_rows:
        return logits_RV
    device = logits_RV.device
    where = np.concatenate(
        [(np.full_like(of_row.tokens_E, row), of_row.tokens_E) for row, of_row in of_rows.items()], 1
    )
    terms = np.concatenate([of_row.terms_3E for of_row in of_rows.values()], 1)
    where_2E = torch.from_numpy(where).to(device)
    adjusted_RV = logits_RV.clone()
    apply_penalties(adjusted_RV, where_2E[0], where_2E[1], torch.from_numpy(terms).to(device))
    return adjusted_RV


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    device = logits_RV.device
    temperatures = [0.0 if row.is_greedy else row.params.temperature for row in rows]
    temperatures_R = torch.tensor(temperatures, dtype=torch.float32, device=device)
    keys = [noise_key(row.seed, row.choice, row.position, row.draw) for row in rows]
    keys_R2 = torch.tensor(keys, dtype=torch.int32, device=device)
    return gumbel_argmax(logits_RV, temperatures_R, _filter(logits_RV, rows, temperatures_R), keys_R2)


def _filter(logits_RV: Tensor, rows: Sequence[SamplingRow], temperatures_R: Tensor) -> Tensor:
    filtered = [index for index, row in enumerate(rows) if row.is_filtered]
    device = logits_RV.device
    thresholds_R = torch.full((len(rows),), -math.inf, device=device)
    if not filtered:
        return thresholds_R
    params = [rows[index].params for index in filtered]
    index_F = torch.tensor(filtered, device=device)
    is_every_row = len(filtered) == len(rows)
    thresholds_F = filter_thresholds(
        logits_RV if is_every_row else logits_RV.index_select(0, index_F),
        temperatures_R.index_select(0, index_F),
        torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
    )
    return thresholds_R.index_copy_(0, index_F, thresholds_F)


def _with_logprobs(logits_RV: Tensor, chosen_R: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    vocab_size = logits_RV.shape[1]
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    num_top = min(vocab_size, max(rows[index].params.logprobs or 0 for index in wanted))
    index_L = torch.tensor(wanted, device=logits_RV.device)
    logprobs_LV = logits_RV.index_select(0, index_L).log_softmax(-1)
    of_chosen = logprobs_LV.gather(1, chosen_R.index_select(0, index_L).unsqueeze(1)).squeeze(1).tolist()
    top = logprobs_LV.topk(num_top)
    of_row = {}
    for index, logprob, ids, values in zip(wanted, of_chosen, top.indices.tolist(), top.values.tolist(), strict=True):
        num_wanted = rows[index].params.logprobs or 0
        # Equally likely tokens come in the order of their ids.
        ranked = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        of_row[index] = TokenLogprobs(logprob, tuple(ranked[:num_wanted]))
    return [SampledToken(token_id, of_row.get(index)) for index, token_id in enumerate(chosen_R.tolist())]
