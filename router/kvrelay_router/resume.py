"""Whether a decode worker that lost its hand-off may compute the rest itself."""

from __future__ import annotations

from kvrelay_router.committer import Committer
from kvrelay_router.leg import Leg


def may_resume(leg: Leg, committer: Committer, num_prompt: int, verified_tokens: int) -> bool:
    """`verified_tokens`: of the input, whose KV it has. It computes a short rest, for one choice."""
    pending = [choice for choice in leg.choices if not committer.is_over(choice)]
    committed = max(map(committer.next_position, pending), default=0)
    if len(pending) > 1 and committed:
        return False
    return num_prompt + committed - verified_tokens <= leg.route.decode_alone_tokens
