"""What can be wrong with a ticket, by what it should be refused for: name -> a function that alters the ticket.

The ticket has at least two full blocks, a partial one and a full hash unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvrelay.v1.common_pb2 import KvTicket

Alter = Callable[[KvTicket], object]


def permute_blocks(ticket: KvTicket) -> None:
    blocks = ticket.groups[0].blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def permute_pairs(ticket: KvTicket) -> None:
    """Each block with its own word: only the order is wrong."""
    permute_blocks(ticket)
    words = ticket.groups[0].words
    words[0], words[1] = words[1], words[0]


def drop_partial(ticket: KvTicket) -> None:
    del ticket.groups[0].blocks[-1]
    del ticket.groups[0].words[-1]


def set_block(ticket: KvTicket, block: int) -> None:
    ticket.groups[0].blocks[0] = block


def add_to_block(ticket: KvTicket, amount: int) -> None:
    ticket.groups[0].blocks[0] += amount


def add_to(target: Any, name: str, amount: float) -> None:
    setattr(target, name, getattr(target, name) + amount)


def flip(target: Any, name: str) -> None:
    """The first bit."""
    data = getattr(target, name)
    setattr(target, name, bytes([data[0] ^ 1]) + data[1:])


def fit_blocks(ticket: KvTicket) -> None:
    """As a worker with blocks twice as large would have issued it."""
    ticket.layout.block_tokens *= 2
    num_blocks = -(-ticket.num_tokens // ticket.layout.block_tokens)
    del ticket.groups[0].blocks[num_blocks:]
    del ticket.groups[0].words[num_blocks:]


def flip_word(ticket: KvTicket) -> None:
    ticket.groups[0].words[1] ^= 1


SIGNED: dict[str, Alter] = {
    "blocks permuted": permute_blocks,
    "blocks and words permuted": permute_pairs,
    "a block replaced": lambda ticket: add_to_block(ticket, 7),
    "a block out of range": lambda ticket: set_block(ticket, 10**6),
    "a word changed": flip_word,
    "larger blocks": fit_blocks,
    "lease: first_follow_s": lambda ticket: add_to(ticket.lease, "first_follow_s", 600),
    "lease: beat_s": lambda ticket: add_to(ticket.lease, "beat_s", 60),
    "lease: missed_beats": lambda ticket: add_to(ticket.lease, "missed_beats", 1000),
    "lease: lost_grace_s": lambda ticket: add_to(ticket.lease, "lost_grace_s", 60),
    "lease: wall_cap_s": lambda ticket: add_to(ticket.lease, "wall_cap_s", 1e9),
    "ticket_id": lambda ticket: setattr(ticket, "ticket_id", "another"),
    "source: worker": lambda ticket: setattr(ticket.source, "worker_id", "another"),
    "hmac flipped": lambda ticket: flip(ticket, "hmac"),
    "hmac cut": lambda ticket: setattr(ticket, "hmac", ticket.hmac[:16]),
    "hmac left out": lambda ticket: ticket.ClearField("hmac"),
}
OF_ANOTHER_SOURCE: dict[str, Alter] = {
    "unregistered port": lambda ticket: setattr(ticket.source, "address", "127.0.0.1:9"),
    "unregistered host": lambda ticket: setattr(ticket.source, "address", "198.51.100.7:50061"),
    "no port": lambda ticket: setattr(ticket.source, "address", "127.0.0.1"),
}
OTHER_CONTENT: dict[str, Alter] = {
    "attempt: number": lambda ticket: add_to(ticket.attempt, "attempt", 1),
    "attempt: request": lambda ticket: setattr(ticket.attempt, "request_id", "another"),
    "attempt: router": lambda ticket: setattr(ticket.attempt, "router_id", "another"),
    "num_tokens": lambda ticket: add_to(ticket, "num_tokens", -1),
    "more tokens than blocks": lambda ticket: add_to(ticket, "num_tokens", 100),
    "partial block left out": drop_partial,
    "null block": lambda ticket: set_block(ticket, 0),
    "first_token": lambda ticket: add_to(ticket.groups[0], "first_token", 16),
    "another group": lambda ticket: add_to(ticket.groups[0], "group", 1),
    "two groups": lambda ticket: ticket.groups.append(ticket.groups[0]),
    "hashes": lambda ticket: flip(ticket, "block_hashes"),
    "hashes left out": lambda ticket: ticket.ClearField("block_hashes"),
    "fingerprint": lambda ticket: flip(ticket, "model_fingerprint"),
    "layout: block_tokens": lambda ticket: add_to(ticket.layout, "block_tokens", ticket.layout.block_tokens),
    "layout: num_layers": lambda ticket: add_to(ticket.layout, "num_layers", 1),
    "layout: dtype": lambda ticket: setattr(ticket.layout, "dtype", "bfloat16"),
}
MALFORMED: dict[str, Alter] = {
    "no blocks": lambda ticket: ticket.ClearField("groups"),
    "a word left out": lambda ticket: ticket.groups[0].words.pop(),
    "half a hash": lambda ticket: setattr(ticket, "block_hashes", ticket.block_hashes[:-1]),
    "half an epoch": lambda ticket: setattr(ticket, "engine_epoch", ticket.engine_epoch[:8]),
    "a lease for ever": lambda ticket: setattr(ticket.lease, "wall_cap_s", float("inf")),
    "no attempt": lambda ticket: ticket.ClearField("attempt"),
    "no layout": lambda ticket: ticket.ClearField("layout"),
}
