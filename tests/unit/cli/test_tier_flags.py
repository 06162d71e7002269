"""Sizes and folders of `--host-cache` and `--disk-cache`, and what becomes of them."""

from __future__ import annotations

import argparse

import pytest

from kvrelay_cli import flag_types
from kvrelay_cli.tier_flags import add_tier_flags, tier_config
from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers.tier_config import TierConfig


def parse(*words: str) -> TierConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_tier_flags(parser)
    return tier_config(parser.parse_args(words))


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4GiB", 4 << 30), ("1.5MiB", 3 << 19), ("2TiB", 2 << 40), ("8KiB", 8192), ("123", 123)]
)
def test_a_size_has_a_unit_or_is_in_bytes(text: str, size_bytes: int) -> None:
    assert flag_types.size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4GB", "-1GiB", "nan", "infGiB", "0", "4 GiB x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="4GiB"):
        flag_types.size(text)


def test_flags_become_the_configuration() -> None:
    assert parse() == TierConfig()
    config = parse("--host-cache", "1GiB", "--disk-cache", "/a:b/c:2MiB", "--cache-secret-file", "s")
    assert config == TierConfig(host_bytes=1 << 30, disk_dir="/a:b/c", disk_bytes=2 << 20, secret_file="s")


@pytest.mark.parametrize("text", ["/a", "/a:", ":1GiB", "/a:b"])
def test_a_folder_needs_a_size(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, argparse.ArgumentError)):
        parse("--disk-cache", text)


def test_a_password_in_a_command_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="--redis-password-file"):
        parse("--redis-url", "redis://:secret@h:1")
