"""Which blocks of a windowed layer are kept: the rule against a naive model, promises against what is held, sizes."""

from __future__ import annotations

import pytest
from engine_rig import EngineRig, make_config, make_generation, prompt_of
from fake_runner import fake_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvrelay_engine.kv_startup import sliding_blocks_for, split_bytes
from kvrelay_engine.sliding_blocks import held, most_blocks, most_in_ticket, most_while_computing, most_while_decoding
from kvrelay_transfer.layout import KvLayout

POWERS = st.sampled_from((1, 2, 4, 8, 16))


def seen_by(position: int, window: int) -> range:
    """Positions that the token sees."""
    return range(max(0, position - window + 1), position + 1)


@given(st.integers(0, 200), POWERS, st.integers(1, 60))
def test_the_first_block_kept_is_the_first_that_a_token_to_come_sees(
    num_tokens: int, block_tokens: int, window: int
) -> None:
    """The naive model: all blocks that any of the next tokens sees."""
    layout = fake_layout(block_tokens, window=window)
    seen = {slot // block_tokens for token in range(num_tokens, num_tokens + 100) for slot in seen_by(token, window)}
    assert layout.first_block(num_tokens) == min(seen)


@given(st.integers(1, 100), POWERS)
def test_as_many_blocks_as_consecutive_tokens_can_touch(num_tokens: int, block_tokens: int) -> None:
    naive = max(
        len({slot // block_tokens for slot in range(start, start + num_tokens)}) for start in range(block_tokens)
    )
    assert most_blocks(num_tokens, block_tokens) == naive


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 30),
    POWERS,
    st.integers(4, 40),
)
def test_tables_hold_what_the_next_tokens_see_and_no_more_than_was_promised(
    requests: list[tuple[int, int, int]], window: int, block_tokens: int, max_batched_tokens: int
) -> None:
    """After each step of any schedule: the naive model says which entries are of use. `load` checks the promises, and
    the runner that every token saw its window."""
    rig = EngineRig(
        window=window, sliding_blocks=800, kv_blocks=800, block_tokens=block_tokens, hash_unit_tokens=16,
        max_batched_tokens=max_batched_tokens, max_num_seqs=4, decode_alone_tokens=1000,
    )  # fmt: skip
    try:
        for number, (num_prompt, num_new, num_choices) in enumerate(requests):
            rig.decode(number, make_generation(prompt_of(num_prompt, number % 2), num_new, num_choices=num_choices))
        while rig.step():
            rig.load()
            for sequence in rig.engine.scheduler.running:
                sees = {slot // block_tokens for slot in seen_by(sequence.num_computed, window)}
                kept = {index for index, block in enumerate(sequence.sliding) if block}
                computed = -(-sequence.num_computed // block_tokens)
                assert kept >= {index for index in sees if index < computed}
                assert not {index for index in kept if index < min(sees)}
        rig.check_empty()
    finally:
        rig.close()


@pytest.mark.parametrize("early", [1, 2])
def test_a_block_freed_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch, early: int) -> None:
    """The tests here and those of whole engines can fail."""
    first_block = KvLayout.first_block
    monkeypatch.setattr(KvLayout, "first_block", lambda layout, n: first_block(layout, n) + (early if n > 20 else 0))
    rig = EngineRig(window=10, max_batched_tokens=16)
    rig.decode(1, make_generation(prompt_of(60), 10))
    rig.run()
    assert rig.runner.wrong_windows
    rig.close()


# ------------------------------------------------------------------------------------------------- sizes

FULL = KvLayout("bfloat16", num_layers=8, num_kv_heads=4, block_tokens=64, head_dim=256)
SLIDING = replace(FULL, num_layers=40, window=1024)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("num_gib", [1, 8, 40])
def test_memory_is_cut_between_the_groups(role: str, num_gib: int) -> None:
    config = make_config(role, max_num_seqs=64, max_batched_tokens=2048, block_tokens=64, kv_blocks=None)
    num_full, num_sliding = split_bytes(num_gib << 30, config, FULL, SLIDING, 131_072)
    used = num_full * FULL.block_bytes + num_sliding * SLIDING.block_bytes
    assert (num_gib << 30) - FULL.block_bytes < used <= num_gib << 30
    assert 2 <= num_sliding <= num_full
    most = most_while_computing(SLIDING, 2048) + (most_in_ticket(SLIDING) if role == "prefill" else 0)
    assert num_sliding > most, "not even one sequence of any length fits"
    assert num_sliding <= sliding_blocks_for(config, SLIDING, 64)


def test_a_longest_sequence_needs_a_fraction_of_what_it_did() -> None:
    """Of 32k tokens, prefill holds 7 % of the sliding blocks that one pool held."""
    needed = most_while_computing(SLIDING, 1024) + most_in_ticket(SLIDING)
    assert (needed, SLIDING.blocks_for(32_768)) == (50, 512)
    assert most_while_decoding(SLIDING) == 18


def test_null_entries_are_no_blocks() -> None:
    assert held([0, 0, 5, 0, 7]) == [5, 7]
