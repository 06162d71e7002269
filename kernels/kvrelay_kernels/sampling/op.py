"""The steps from logits to a token: the public functions, dispatched by device.

R rows of logits, float32 and contiguous; every row has its own parameters (float32 unless said otherwise).
"""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.sampling import reference


def apply_penalties(logits_RV: Tensor, rows_E: Tensor, tokens_E: Tensor, terms_3E: Tensor) -> None:
    """Changes E single logits in place; the pairs (row, token), int64, are distinct.

    `terms_3E` holds for each a bias that is added first, a repetition penalty by which a negative logit is
    multiplied and another divided, and an amount that is subtracted last (infinity bans the token).
    """
    if logits_RV.is_cuda:
        from kvrelay_kernels.sampling import kernel

        return kernel.apply_penalties(logits_RV, rows_E, tokens_E, terms_3E)
    return reference.apply_penalties(logits_RV, rows_E, tokens_E, terms_3E)


def filter_thresholds(
    logits_RV: Tensor, temperatures_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Returns for each row the least logit that top-k, then top-p, then min-p leave in: float32 [R].

    `temperatures_R` > 0 shape the probabilities; the thresholds are for the logits as given, before the
    temperature. top_k (int32) of 0 or more than V is none, top_p 1 and min_p 0 are none: with none of them
    the threshold is -inf. The most likely token always stays, and tokens equal to the threshold stay together.
    """
    if logits_RV.is_cuda:
        from kvrelay_kernels.sampling import kernel

        return kernel.filter_thresholds(logits_RV, temperatures_R, top_k_R, top_p_R, min_p_R)
    return reference.filter_thresholds(logits_RV, temperatures_R, top_k_R, top_p_R, min_p_R)


def gumbel_argmax(logits_RV: Tensor, temperatures_R: Tensor, thresholds_R: Tensor, keys_R2: Tensor) -> Tensor:
    """Draws one token per row from softmax(logits / temperature) over the logits >= threshold: int64 [R].

    Takes the argmax of logits / temperature + Gumbel noise. `keys_R2` (int32) are the words of `noise_key`.
    A temperature of 0 takes the largest logit and no noise; ties go to the lowest token id.
    """
    if logits_RV.is_cuda:
        from kvrelay_kernels.sampling import kernel

        return kernel.gumbel_argmax(logits_RV, temperatures_R, thresholds_R, keys_R2)
    return reference.gumbel_argmax(logits_RV, temperatures_R, thresholds_R, keys_R2)
