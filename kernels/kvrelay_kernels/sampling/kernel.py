"""Penalties, filters and the noisy argmax in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.launch import launch_for, num_multiprocessors
from kvrelay_kernels.sampling import noise

_GOLDEN = tl.constexpr(noise.GOLDEN)
_MIX_1 = tl.constexpr(noise.MIX_1)
_MIX_2 = tl.constexpr(noise.MIX_2)
_MAX_UNIFORM = tl.constexpr(noise.MAX_UNIFORM)


@triton.jit
def _apply_penalties_kernel(
    logits_ptr, rows_ptr, tokens_ptr, terms_ptr, row_stride, num_entries, TILE: tl.constexpr
):  # fmt: skip
    entries = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = entries < num_entries
    row = tl.load(rows_ptr + entries, mask=mask, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + entries, mask=mask, other=0)
    bias = tl.load(terms_ptr + entries, mask=mask, other=0.0)
    repetition = tl.load(terms_ptr + num_entries + entries, mask=mask, other=1.0)
    subtract = tl.load(terms_ptr + 2 * num_entries + entries, mask=mask, other=0.0)
    logit_ptr = logits_ptr + row * row_stride + token
    value = tl.load(logit_ptr, mask=mask, other=0.0) + bias
    value = tl.where(value < 0, value * repetition, value / repetition)
    tl.store(logit_ptr, value - subtract, mask=mask)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _gumbel(tokens, key_low, key_high):
    bits = _mix(_mix(tokens.to(tl.uint32) * _GOLDEN + key_low) ^ key_high) & 0x7FFFFFFF
    uniform = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, _MAX_UNIFORM)
    # log(1 - v) loses the small v that matter; the quotient corrects for the rounding of 1 - v (W. Kahan).
    rest = 1.0 - uniform
    log1p = tl.where(rest == 1.0, -uniform, tl.log(rest) * (uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-log1p)


@triton.jit
def _gumbel_argmax_kernel(
    logits_ptr, temperatures_ptr, thresholds_ptr, keys_ptr, best_ptr, token_ptr, vocab_size, row_stride, span,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    threshold = tl.load(thresholds_ptr + row)
    key_low = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    key_high = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
    lanes = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_token = part * span + lanes
    end = tl.minimum(vocab_size, (part + 1) * span)
    for start in range(part * span, end, TILE):
        tokens = start + lanes
        logits = tl.load(logits_ptr + row * row_stride + tokens, mask=tokens < end, other=float("-inf"))
        scores = logits
        if temperature > 0:
            noisy = logits / temperature + _gumbel(tokens, key_low, key_high)
            scores = tl.where(logits >= threshold, noisy, float("-inf"))
        is_better = scores > best
        best = tl.where(is_better, scores, best)
        best_token = tl.where(is_better, tokens, best_token)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, best_token, vocab_size), axis=0)
    tl.store(best_ptr + row * tl.num_programs(1) + part, top)
    tl.store(token_ptr + row * tl.num_programs(1) + part, token.to(tl.int64))


@triton.jit
def _ordered(logits):
    """Unsigned integers in the order of the logits."""
    bits = logits.to(tl.int32, bitcast=True)
    flip = (bits >> 31) | -2147483648
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton.jit
def _weigh(logits_ptr, vocab_size, keys, floor, largest, temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """For each of four keys the number, or unnormalised probability, of the logits from it and `floor` up."""
    weights = tl.zeros([4, TILE], tl.float32)
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        ordered = _ordered(logits)
        weight = tl.where((tokens < vocab_size) & (ordered >= floor), 1.0, 0.0)
        if BY_MASS:
            weight *= tl.exp((logits - largest) / temperature)
        weights += tl.where(ordered[None, :] >= keys[:, None], weight[None, :], 0.0)
    return tl.sum(weights, axis=1)


@triton.jit
def _search(logits_ptr, vocab_size, target, floor, largest, temperature, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest key such that the logits from it up weigh at least `target`: that of a logit.

    Finds two bits in a pass, from the highest down.
    """
    digits = tl.arange(0, 4).to(tl.uint32) << 30
    # `floor * 0` has the type of a key, also where Triton sees a constant.
    found = floor * 0
    for _ in range(16):
        keys = found + digits
        weights = _weigh(logits_ptr, vocab_size, keys, floor, largest, temperature, BY_MASS, TILE)
        # The first key is reached always, and the weights fall.
        found = tl.max(tl.where((weights >= target) | (digits == 0), keys, found), axis=0)
        digits = digits >> 2
    return found


@triton.jit
def _thresholds_kernel(
    logits_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, vocab_size, row_stride, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    largest_lane = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        largest_lane = tl.maximum(largest_lane, logits)
    largest = tl.max(largest_lane, axis=0)

    floor = _ordered(largest) * 0
    if (top_k > 0) & (top_k < vocab_size):
        floor = _search(logits_ptr, vocab_size, top_k.to(tl.float32), floor, largest, temperature, False, TILE)
    if top_p < 1:
        every_key = tl.zeros([4], tl.uint32)
        mass = tl.max(_weigh(logits_ptr, vocab_size, every_key, floor, largest, temperature, True, TILE), axis=0)
        # At least the largest logit, whose weight is 1.
        target = tl.minimum(tl.maximum(top_p * mass, 1e-30), mass)
        floor = _search(logits_ptr, vocab_size, target, floor, largest, temperature, True, TILE)
    bits = tl.where(floor >= 0x80000000, floor ^ 0x80000000, floor ^ 0xFFFFFFFF).to(tl.int32, bitcast=True)
    threshold = tl.where(floor == 0, float("-inf"), bits.to(tl.float32, bitcast=True))
    if min_p > 0:
        threshold = tl.maximum(threshold, largest + temperature * tl.log(min_p))
    tl.store(out_ptr + row, threshold)


def apply_penalties(logits_RV: Tensor, rows_E: Tensor, tokens_E: Tensor, terms_3E: Tensor) -> None:
    """See `kvrelay_kernels.sampling.op.apply_penalties`."""
    num_entries = len(rows_E)
    assert terms_3E.is_contiguous()
    if num_entries:
        launch = launch_for("penalties", "entries", logits_RV.device)
        _apply_penalties_kernel[(triton.cdiv(num_entries, launch.tile),)](
            logits_RV, rows_E, tokens_E, terms_3E, logits_RV.stride(0), num_entries, TILE=launch.tile
        )


def filter_thresholds(
    logits_RV: Tensor, temperatures_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """See `kvrelay_kernels.sampling.op.filter_thresholds`."""
    num_rows, vocab_size = logits_RV.shape
    thresholds_R = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    if num_rows:
        launch = launch_for("thresholds", "row", logits_RV.device)
        _thresholds_kernel[(num_rows,)](
            logits_RV,
            temperatures_R,
            top_k_R,
            top_p_R,
            min_p_R,
            thresholds_R,
            vocab_size,
            logits_RV.stride(0),
            TILE=launch.tile,
            num_warps=launch.num_warps,
        )
    return thresholds_R


def gumbel_argmax(logits_RV: Tensor, temperatures_R: Tensor, thresholds_R: Tensor, keys_R2: Tensor) -> Tensor:
    """See `kvrelay_kernels.sampling.op.gumbel_argmax`."""
    num_rows, vocab_size = logits_RV.shape
    device = logits_RV.device
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    launch = launch_for("gumbel", "row", device)
    wanted_parts = triton.cdiv(2 * num_multiprocessors(device), num_rows)
    num_parts = max(1, min(wanted_parts, triton.cdiv(vocab_size, launch.tile)))
    span = triton.cdiv(triton.cdiv(vocab_size, launch.tile), num_parts) * launch.tile
    num_parts = triton.cdiv(vocab_size, span)
    best_RS = torch.empty((num_rows, num_parts), dtype=torch.float32, device=device)
    tokens_RS = torch.empty((num_rows, num_parts), dtype=torch.int64, device=device)
    _gumbel_argmax_kernel[(num_rows, num_parts)](
        logits_RV,
        temperatures_R,
        thresholds_R,
        keys_R2,
        best_RS,
        tokens_RS,
        vocab_size,
        logits_RV.stride(0),
        span,
        TILE=launch.tile,
        num_warps=launch.num_warps,
    )
    # Parts are in the order of the token ids, and argmax takes the first of equals.
    return tokens_RS.gather(1, best_RS.argmax(1, keepdim=True)).squeeze(1)
