"""Drives a `ModelRunner` greedily with a plain block table each: what the engine does, without an engine.

Blocks start as NaN, so that a read of a slot that was never written shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvrelay_engine.loader import LoadedModel, load_model
from kvrelay_engine.model_runner import ModelRunner
from kvrelay_engine.runner import BatchRow

BLOCK_TOKENS = 16


@dataclass
class RigSequence:
    tokens: list[int]
    block_table: list[int]
    num_prompt: int
    num_computed: int = 0

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]


@dataclass
class ModelRig:
    loaded: LoadedModel
    num_blocks: int = 96
    block_tokens: int = BLOCK_TOKENS
    pool: torch.Tensor = field(init=False)
    runner: ModelRunner = field(init=False)
    free_blocks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        layout = self.loaded.kv_layout(self.block_tokens, 64)
        dtype = getattr(torch, layout.dtype)
        shape = (self.num_blocks, *layout.shape)
        self.pool = torch.full(shape, float("nan"), dtype=dtype, device=self.loaded.device)
        self.runner = ModelRunner(self.loaded, self.pool, layout)
        # Taken from alternating ends: neighbouring blocks of a sequence are far apart in the pool.
        ascending = list(range(1, self.num_blocks))
        self.free_blocks = [ascending.pop(-1 if index % 2 else 0) for index in range(len(ascending))]

    def add(self, prompt: Sequence[int], num_tokens: int) -> RigSequence:
        """A sequence with blocks for the prompt and `num_tokens` more."""
        num_blocks = -(-(len(prompt) + num_tokens) // self.block_tokens)
        return RigSequence(list(prompt), [self.free_blocks.pop() for _ in range(num_blocks)], len(prompt))

    def generate(self, sequences: Sequence[RigSequence], num_tokens: int, chunk_tokens: int = 10_000) -> None:
        """Steps until each has `num_tokens` new tokens. Sequences whose prompt is done decode beside chunks of
        the others."""
        while running := [sequence for sequence in sequences if len(sequence.generated) < num_tokens]:
            self.step(running, chunk_tokens)

    def step(self, sequences: Sequence[RigSequence], chunk_tokens: int = 10_000) -> None:
        rows = []
        for sequence in sequences:
            chunk = sequence.tokens[sequence.num_computed :][:chunk_tokens]
            is_last = sequence.num_computed + len(chunk) == len(sequence.tokens)
            rows.append(BatchRow(chunk, sequence.num_computed, sequence.block_table, is_last))
            sequence.num_computed += len(chunk)
        best = iter(self.runner.run(rows).argmax(-1).tolist())
        for sequence, row in zip(sequences, rows, strict=True):
            if row.wants_logits:
                sequence.tokens.append(next(best))


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
