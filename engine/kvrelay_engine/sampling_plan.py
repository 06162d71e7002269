"""Which tokens a step draws from which logits: one for a decoding sequence, one per choice for a trunk."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from kvrelay_engine.sampler import SampledToken, SamplingRow
from kvrelay_engine.scheduler import Batch
from kvrelay_engine.sequence import Sequence

DrawnTokens = dict[Sequence, dict[int, SampledToken]]  # by choice; an empty dict where nothing is drawn


@dataclass(slots=True, frozen=True)
class Drawn:
    tokens: DrawnTokens
    broken: set[Sequence]  # whose logits are not numbers


@dataclass(slots=True)
class SamplingPlan:
    rows: list[SamplingRow] = field(default_factory=list)
    owners: list[Sequence] = field(default_factory=list)  # of the rows
    sequences: list[Sequence] = field(default_factory=list)  # that wanted logits, in the order of the logits

    def collect(self, sampled: SequenceOf[SampledToken | None]) -> Drawn:
        drawn = Drawn({sequence: {} for sequence in self.sequences}, set())
        for row, owner, token in zip(self.rows, self.owners, sampled, strict=True):
            if token is None:
                drawn.broken.add(owner)
            else:
                drawn.tokens[owner][row.choice] = token
        return drawn


def plan_draws(batch: Batch) -> SamplingPlan:
    plan = SamplingPlan()
    for logits_row, row in enumerate(row for row in batch.rows if row.wants_logits):
        sequence = row.sequence
        plan.sequences.append(sequence)
        for choice in _choices_to_draw(sequence):
            plan.rows.append(_sampling_row(logits_row, sequence, choice))
            plan.owners.append(sequence)
    return plan


def _choices_to_draw(sequence: Sequence) -> list[int]:
    """A trunk of several choices draws only for those that have no committed token (PROTOCOL C1)."""
    pending = sequence.request.pending_choices
    if len(pending) > 1:
        return [choice.index for choice in pending if not choice.committed]
    return [sequence.choice]


def _sampling_row(logits_row: int, sequence: Sequence, choice: int) -> SamplingRow:
    generation = sequence.request.generation
    return SamplingRow(
        logits_row=logits_row,
        params=generation.sampling,
        seed=generation.seed,
        choice=choice,
        position=sequence.num_generated,
        prompt=sequence.request.prompt_tokens,
        output=sequence.tokens[sequence.num_prompt :],
        eos_token_ids=generation.eos_token_ids,
    )
