"""Moves KV between pools: layout, ticket, fence, lease, connectors. Knows nothing of gRPC, scheduling or models."""
