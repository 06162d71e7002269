"""`--config FILE`: a TOML file with the same names as a command's flags. Flags on the command line win.

model = "./my-model"
prefill = 2
kv-blocks = 4096          # or kv_blocks
decode-devices = [1, 2]   # as on the command line: 1,2
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvrelay_core.errors import ConfigError


def set_defaults_from(parser: argparse.ArgumentParser, path: Path) -> None:
    """Makes the file's values the defaults of the parser's flags. Raises ConfigError naming the key at fault."""
    actions = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "config")
    }
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in actions:
            raise ConfigError(f"{path}: unknown key {key!r}{_suggestion(name, actions)}")
        parser.set_defaults(**{name: _convert(actions[name], value, f"{path}: {key}")})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """As if the value had been written after its flag."""
    if action.nargs == 0 and isinstance(value, bool):  # a flag without a value
        return value
    if isinstance(value, bool | dict) or action.nargs == 0:
        raise ConfigError(f"{where} must be a text, a number or a list, not {value!r}")
    text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
    converted: Any = text
    if callable(action.type):
        try:
            converted = action.type(text)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{where}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise ConfigError(f"{where}: {text!r} is not one of {', '.join(map(str, action.choices))}")
    return converted


def _suggestion(name: str, actions: Mapping[str, argparse.Action]) -> str:
    close = difflib.get_close_matches(name, actions, n=1)
    return f"; did you mean {close[0].replace('_', '-')!r}?" if close else "; see --help for the names"
