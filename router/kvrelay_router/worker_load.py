"""What a worker's own report of its load says in tokens, for comparison with this router's account of it."""

from __future__ import annotations

from kvrelay.v1.worker_pb2 import DescribeResponse, WatchLoadResponse


def reported_tokens(role: str, description: DescribeResponse, load: WatchLoadResponse) -> int:
    """Never more than what its requests were charged with: of a prefill worker the tokens that it has yet to
    compute, of a decode worker those whose KV it holds, without the started blocks."""
    if role == "prefill":
        return load.tokens_queued
    block_tokens = description.layouts[0].block_tokens if description.layouts else 0
    num_requests = load.requests_running + load.requests_waiting_remote_kv
    return max(0, load.blocks_in_use - num_requests) * block_tokens
