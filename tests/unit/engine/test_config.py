"""What an engine is told: round trip, unknown fields, and errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_rig import make_config

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config import load_config


def test_text_and_file_say_the_same(tmp_path: Path) -> None:
    config = make_config("prefill", kv_blocks=None, memory_fraction=0.5)
    path = tmp_path / "engine.json"
    path.write_text(config.to_json())
    assert load_config(config.to_json()) == load_config(str(path)) == config


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block_tokens": 48}, "block_tokens must be a power of two, not 48"),
        ({"hash_unit_tokens": 0}, "hash_unit_tokens"),
        ({"max_batched_tokens": 7}, "max_batched_tokens (7) must be at least max_num_seqs (8)"),
        ({"kv_blocks": 1}, "kv_blocks"),
        ({"kv_blocks": 9, "memory_fraction": 0.5}, "not both"),
        ({"kv_blocks": None, "memory_fraction": 1.5}, "memory_fraction"),
        ({"max_pinned_share": 0.0}, "max_pinned_share"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N"),
        ({"model": ""}, "model must not be empty"),
        ({"commands_endpoint": "x"}, "commands_endpoint must be a ZeroMQ endpoint"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"decode_alone_tokens": -1}, "decode_alone_tokens"),
        ({"patience_s": float("nan")}, "patience_s"),
        ({"step_target_s": 0.0}, "step_target_s"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**changes)
    assert text in caught.value.message


def test_a_step_is_as_long_as_suits_the_device_and_never_short_of_a_token_per_sequence() -> None:
    assert make_config(max_batched_tokens=None).tokens_per_step == 512
    assert make_config(max_batched_tokens=None, device="cuda:1").tokens_per_step == 8192
    assert make_config(max_batched_tokens=None, max_num_seqs=600).tokens_per_step == 600


def test_unknown_and_missing_fields_are_named() -> None:
    fields = msgspec.to_builtins(make_config())
    with pytest.raises(ConfigError, match="kv_blockz"):
        load_config(msgspec.json.encode(fields | {"kv_blockz": 3}).decode())
    del fields["model"]
    with pytest.raises(ConfigError, match="model"):
        load_config(msgspec.json.encode(fields).decode())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the engine configuration .*nothing\.json"):
        load_config(str(tmp_path / "nothing.json"))
