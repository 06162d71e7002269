"""Drives a `ModelRunner` greedily with a plain block table each: what the engine does, without an engine.

Blocks start as NaN, so that a read of a slot that was never written shows. Those of layers with a window become NaN
again as soon as no token to come sees them, and their table entries null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvrelay_core.media.mrope import MropePositions
from kvrelay_engine.loader import LoadedModel, load_model
from kvrelay_engine.model_runner import ModelRunner
from kvrelay_engine.runner import BatchRow, MediaRows
from kvrelay_transfer.layout import KvLayout

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class PlacedImage:
    """Its embeddings [n, E] take the places of the tokens from `offset` on; `grid` is in patches, for M-RoPE."""

    offset: int
    rows: torch.Tensor
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds_per_grid: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.rows)

    def within(self, start: int, end: int) -> MediaRows | None:
        """What of it lies in the tokens `start : end`, counted from there."""
        first, last = max(start, self.offset), min(end, self.offset + self.num_tokens)
        return MediaRows(first - start, self.rows[first - self.offset : last - self.offset]) if first < last else None


@dataclass
class RigSequence:
    tokens: list[int]
    block_table: list[int]
    num_prompt: int
    num_computed: int = 0
    sliding_table: list[int] = field(default_factory=list)
    images: Sequence[PlacedImage] = ()
    positions: MropePositions | None = None

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]


@dataclass
class ModelRig:
    loaded: LoadedModel
    num_blocks: int = 96
    block_tokens: int = BLOCK_TOKENS
    pool: torch.Tensor = field(init=False)  # of the layers that see the whole context
    sliding_pool: torch.Tensor | None = field(init=False)
    layouts: tuple[KvLayout, ...] = field(init=False)
    runner: ModelRunner = field(init=False)
    free_blocks: list[int] = field(init=False)
    logits: torch.Tensor = field(init=False)  # of the last step

    def __post_init__(self) -> None:
        self.layouts = self.loaded.kv_layouts(self.block_tokens, 64)
        pools = [self._make_pool(layout) for layout in self.layouts]
        self.pool, self.sliding_pool = pools[0], pools[1] if len(pools) > 1 else None
        self.runner = ModelRunner(self.loaded, pools, self.layouts)
        # Taken from alternating ends: neighbouring blocks of a sequence are far apart in the pool.
        ascending = list(range(1, self.num_blocks))
        self.free_blocks = [ascending.pop(-1 if index % 2 else 0) for index in range(len(ascending))]

    def _make_pool(self, layout: KvLayout) -> torch.Tensor:
        shape = (self.num_blocks, *layout.shape)
        return torch.full(shape, float("nan"), dtype=getattr(torch, layout.dtype), device=self.loaded.device)

    def add(self, prompt: Sequence[int], num_tokens: int, images: Sequence[PlacedImage] = ()) -> RigSequence:
        """A sequence with blocks for the prompt and `num_tokens` more."""
        num_blocks = -(-(len(prompt) + num_tokens) // self.block_tokens)
        blocks = [self.free_blocks.pop() for _ in range(num_blocks)]
        mrope = self.loaded.config.mrope
        positions = MropePositions.of(len(prompt), images, mrope) if mrope and images else None
        sequence = RigSequence(list(prompt), blocks, len(prompt), images=images, positions=positions)
        sequence.sliding_table = list(blocks)
        return sequence

    def generate(self, sequences: Sequence[RigSequence], num_tokens: int, chunk_tokens: int = 10_000) -> None:
        """Steps until each has `num_tokens` new tokens. Sequences whose prompt is done decode beside chunks of
        the others."""
        while running := [sequence for sequence in sequences if len(sequence.generated) < num_tokens]:
            self.step(running, chunk_tokens)

    def step(self, sequences: Sequence[RigSequence], chunk_tokens: int = 10_000) -> None:
        rows = []
        for sequence in sequences:
            chunk = sequence.tokens[sequence.num_computed : self._chunk_end(sequence, chunk_tokens)]
            is_last = sequence.num_computed + len(chunk) == len(sequence.tokens)
            rows.append(self._row(sequence, chunk, is_last))
            sequence.num_computed += len(chunk)
        self.logits = self.runner.run(rows)
        best = iter(self.logits.argmax(-1).tolist())
        for sequence, row in zip(sequences, rows, strict=True):
            if row.wants_logits:
                sequence.tokens.append(next(best))
            self._slide(sequence)

    def _slide(self, sequence: RigSequence) -> None:
        if self.sliding_pool is not None:
            first = self.layouts[1].first_block(sequence.num_computed)
            self.sliding_pool[sequence.sliding_table[:first]] = float("nan")
            sequence.sliding_table[:first] = [0] * first

    def _chunk_end(self, sequence: RigSequence, chunk_tokens: int) -> int:
        """Behind an image that the chunk would split, where its tokens see each other in both directions."""
        end = sequence.num_computed + chunk_tokens
        for image in sequence.images:
            if self.loaded.config.media_see_ahead and image.offset < end < image.offset + image.num_tokens:
                return image.offset + image.num_tokens
        return end

    def _row(self, sequence: RigSequence, chunk: list[int], is_last: bool) -> BatchRow:
        start, end = sequence.num_computed, sequence.num_computed + len(chunk)
        row = BatchRow(chunk, start, sequence.block_table, is_last, sliding_table=sequence.sliding_table)
        row.media = [media for image in sequence.images if (media := image.within(start, end))]
        if sequence.positions is not None:
            row.positions = sequence.positions.between(start, end)
        return row


def greedy(
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    chunk_tokens: int = 10_000,
    device: str = "cpu",
) -> list[list[int]]:
    """Greedy float32 answers, all prompts in one batch."""
    rig = ModelRig(load_model(str(model_dir), "float32", device))
    sequences = [rig.add(prompt, num_tokens) for prompt in prompts]
    rig.generate(sequences, num_tokens, chunk_tokens)
    return [sequence.generated for sequence in sequences]
