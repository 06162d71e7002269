"""Whether the tickets of a request are those of its placeholders."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay_core.errors import MismatchError
from kvrelay_core.request import MediaReference
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.ticket import EmbeddingTicket


def check_tickets(
    media: Sequence[MediaReference], tickets: Sequence[EmbeddingTicket], layout: EmbeddingLayout
) -> dict[bytes, EmbeddingTicket]:
    """One ticket for each item of the request, by content hash; several of one item count as one.

    Raises MismatchError: an item without a ticket, a ticket without an item, rows of another size or type, fewer rows
    than the placeholders take.
    """
    by_hash = {ticket.content_hash: ticket for ticket in tickets}
    hashes = {reference.content_hash for reference in media}
    if hashes != by_hash.keys():
        odd = sorted(one.hex()[:16] for one in hashes ^ by_hash.keys())
        raise MismatchError(f"each image needs a ticket and each ticket an image; without the other: {', '.join(odd)}")
    for ticket in by_hash.values():
        layout.check_compatible(ticket.layout)
        _check_whole(ticket)
    for reference in media:
        ticket = by_hash[reference.content_hash]
        if reference.first_row + reference.num_tokens > ticket.num_tokens:
            raise MismatchError(
                f"the prompt has placeholders for rows {reference.first_row} to "
                f"{reference.first_row + reference.num_tokens} of an image, the encoder made {ticket.num_tokens}; "
                "start router and encoder with one checkpoint",
                media=reference.content_hash.hex(),
            )
    return by_hash


def _check_whole(ticket: EmbeddingTicket) -> None:
    num_blocks = ticket.layout.blocks_for(ticket.num_tokens)
    is_whole = len(ticket.blocks) == len(ticket.words) == num_blocks and num_blocks > 0
    if not is_whole or NULL_BLOCK in ticket.blocks:
        raise MismatchError(f"the ticket does not list the {num_blocks} blocks of its {ticket.num_tokens} rows")
