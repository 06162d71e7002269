"""--config: the same names as the flags, flags win, every mistake is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvrelay_cli.commands import up
from kvrelay_cli.config_file import set_defaults_from
from kvrelay_core.errors import ConfigError


def parse(tmp_path: Path, toml: str, *words: str) -> argparse.Namespace:
    file = tmp_path / "cluster.toml"
    file.write_text(toml)
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    set_defaults_from(parser, file)
    return parser.parse_args(words)


def test_values_are_converted_as_flags_are(tmp_path: Path) -> None:
    args = parse(
        tmp_path,
        'model = "m"\nprefill = 2\nkv-blocks = 40\nmax_model_len = 9\nmemory-fraction = 0.5\ndecode-devices = [1, 2]\n',
    )
    assert (args.model, args.prefill, args.kv_blocks, args.max_model_len) == ("m", 2, 40, 9)
    assert (args.memory_fraction, args.decode_devices) == (0.5, (1, 2))
    assert args.decode == 1
    assert not args.allow_insecure
    assert parse(tmp_path, "allow-insecure = true").allow_insecure


def test_flags_win(tmp_path: Path) -> None:
    args = parse(tmp_path, "prefill = 2\ndecode = 3\n", "--prefill", "4")
    assert (args.prefill, args.decode) == (4, 3)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("prefil = 2", "unknown key 'prefil'; did you mean 'prefill'?"),
        ("config = 'other.toml'", "unknown key 'config'"),
        ("decode = 0", "decode: 0 must be between 1 and 64"),
        ("prefill = 'two'", "'two' is not a whole number"),
        ("prefill = true", "must be a text, a number or a list"),
        ("[prefill]\ncount = 2", "must be a text, a number or a list"),
        ("placement = 'best'", "'best' is not one of"),
        ("prefill = ", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.toml") as raised:
        parse(tmp_path, toml)
    assert message in raised.value.message
