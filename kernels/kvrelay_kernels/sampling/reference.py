"""Penalties, filters and the noisy argmax in torch: the CPU path and the oracle of the kernels.

Rows are worked on one by one, so that the intermediate results of a row stay in the cache. Knows nothing of
requests: every row has its own parameters, and its result depends on no other row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvrelay_kernels.sampling.noise import GOLDEN, MAX_UNIFORM, MIX_1, MIX_2, as_int32

_NUM_BINS = 1024
# exp(-90) is about the least float32.
_NEGLIGIBLE = 90.0


def apply_penalties(logits_RV: Tensor, rows_E: Tensor, tokens_E: Tensor, terms_3E: Tensor) -> None:
    """See `kvrelay_kernels.sampling.op.apply_penalties`."""
    bias_E, repetition_E, subtract_E = terms_3E
    flat_E = rows_E * logits_RV.shape[1] + tokens_E
    flat_logits = logits_RV.view(-1)
    values_E = flat_logits.index_select(0, flat_E).add_(bias_E)
    values_E = torch.where(values_E < 0, values_E * repetition_E, values_E / repetition_E).sub_(subtract_E)
    flat_logits.index_copy_(0, flat_E, values_E)


def filter_thresholds(
    logits_RV: Tensor, temperatures_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """See `kvrelay_kernels.sampling.op.filter_thresholds`."""
    parameters = zip(temperatures_R.tolist(), top_k_R.tolist(), top_p_R.tolist(), min_p_R.tolist(), strict=True)
    thresholds = [_threshold(logits_RV[row], *of_row) for row, of_row in enumerate(parameters)]
    return torch.tensor(thresholds, dtype=torch.float32, device=logits_RV.device)


def gumbel_argmax(logits_RV: Tensor, temperatures_R: Tensor, thresholds_R: Tensor, keys_R2: Tensor) -> Tensor:
    """See `kvrelay_kernels.sampling.op.gumbel_argmax`."""
    tokens_V = torch.arange(logits_RV.shape[1], dtype=torch.int32, device=logits_RV.device)
    chosen_R = torch.empty(logits_RV.shape[0], dtype=torch.int64, device=logits_RV.device)
    parameters = zip(temperatures_R.tolist(), thresholds_R.tolist(), keys_R2.tolist(), strict=True)
    for row, (temperature, threshold, key) in enumerate(parameters):
        logits_V = logits_RV[row]
        if temperature == 0:
            chosen_R[row] = logits_V.argmax()
        elif threshold == -math.inf:
            chosen_R[row] = gumbel_noise(tokens_V, *key).add_(logits_V / temperature).argmax()
        else:
            # Few tokens are left in as a rule: only they need noise.
            left_C = (logits_V >= threshold).nonzero().squeeze(1)
            noise_C = gumbel_noise(left_C.to(torch.int32), *key)
            chosen_R[row] = left_C[noise_C.add_(logits_V.index_select(0, left_C) / temperature).argmax()]
    return chosen_R


def gumbel_noise(tokens_C: Tensor, key_low: int, key_high: int) -> Tensor:
    """Gumbel noise (float32) of int32 token ids; see `kvrelay_kernels.sampling.noise`."""
    bits_C = _mix_(_mix_((tokens_C * as_int32(GOLDEN)).add_(key_low)).bitwise_xor_(key_high))
    uniform_C = bits_C.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=MAX_UNIFORM)
    return uniform_C.neg_().log1p_().neg_().log_().neg_()


def _mix_(x: Tensor) -> Tensor:
    # int32 shifts drag the sign along; the mask makes them logical. Products wrap around.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= as_int32(MIX_1)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= as_int32(MIX_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _threshold(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    threshold = -math.inf
    left_C = logits_V
    if 0 < top_k < len(logits_V):
        left_C = logits_V.topk(top_k).values
        threshold = left_C[-1].item()
    if top_p < 1:
        threshold = _nucleus(left_C, temperature, top_p)
    if min_p > 0:
        # A probability of at least min_p times the largest one.
        threshold = max(threshold, logits_V.max().item() + temperature * math.log(min_p))
    return threshold


def _nucleus(logits_C: Tensor, temperature: float, top_p: float) -> float:
    """The least of the largest logits that together hold `top_p` of the probability.

    Finds the bin in which the sum from above passes `top_p` until few logits are left: a sort of the whole
    vocabulary takes ten times as long.
    """
    probs_C = (logits_C / temperature).softmax(-1)
    mass_above = 0.0
    while len(logits_C) > _NUM_BINS:
        low, high = logits_C.aminmax()
        # What is further below holds nothing; -inf must not stretch the bins.
        width = (high - low).clamp_(max=_NEGLIGIBLE * temperature) / (_NUM_BINS - 1)
        if not width > 0:
            break
        bins_C = ((high - logits_C) / width).clamp_(max=_NUM_BINS - 1).to(torch.int64)
        mass_N = torch.bincount(bins_C, weights=probs_C, minlength=_NUM_BINS).cumsum(0).add_(mass_above)
        found = int((mass_N < top_p).sum().clamp_(max=int(bins_C.max())))
        inside_C = (bins_C == found).nonzero().squeeze(1)
        if len(inside_C) in (0, len(logits_C)):
            break
        mass_above = mass_N[found - 1].item() if found else mass_above
        logits_C, probs_C = logits_C.index_select(0, inside_C), probs_C.index_select(0, inside_C)
    logits_C, order_C = logits_C.sort(descending=True)
    before_C = probs_C.index_select(0, order_C).cumsum(0).roll(1)
    before_C[0] = 0
    num_kept = max(1, int((before_C + mass_above < top_p).sum()))
    return logits_C[num_kept - 1].item()
