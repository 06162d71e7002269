"""When a choice ends, judged from token ids alone. Stop strings are the router's business.

Both roles ask the same function, so a first token that ends its choice ends it on prefill already.
"""

from __future__ import annotations

from kvrelay_core.request import FinishReason, Generation


def finish_reason(generation: Generation, position: int, token_id: int, max_model_len: int) -> FinishReason | None:
    """Whether `token_id` at `position` (from the first generated token, committed ones included) is the last."""
    num_output = position + 1
    if num_output > generation.sampling.min_tokens and is_stop_token(generation, token_id):
        return FinishReason.STOP
    if num_output >= generation.sampling.max_tokens or len(generation.prompt) + num_output >= max_model_len:
        return FinishReason.LENGTH
    return None


def is_stop_token(generation: Generation, token_id: int) -> bool:
    sampling = generation.sampling
    if token_id in sampling.stop_token_ids:
        return True
    return token_id in generation.eos_token_ids and not sampling.ignore_eos
