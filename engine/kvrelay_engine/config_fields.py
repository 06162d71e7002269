"""Typed reading of `config.json`: a missing or ill-typed field becomes a ConfigError that names it.

It knows JSON only, not what the fields mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from kvrelay_core.errors import ConfigError


class ConfigFields:
    """One JSON object. A field that is null counts as absent, as in transformers; `name` goes into messages."""

    def __init__(self, name: str, values: dict[str, object]) -> None:
        self.name = name
        self._values = {key: value for key, value in values.items() if value is not None}

    @classmethod
    def read(cls, path: Path) -> ConfigFields:
        try:
            values = msgspec.json.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; is this a model directory?") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object")
        return cls(path.name, values)

    def has(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(name, "an integer", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong_type(name, "a number", value)
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong_type(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong_type(name, "a string", value)
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty where absent."""
        value = self._values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong_type(name, "a list of strings", value)
        return value

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        value = self._value(name, default)
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise self._wrong_type(name, "a list of integers", value)
        return list(value)

    def section(self, name: str) -> ConfigFields | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong_type(name, "an object", value)
        return ConfigFields(f"{self.name}: {name}", value)

    def empty_section(self, name: str) -> ConfigFields:
        return ConfigFields(f"{self.name}: {name}", {})

    def merged(self, inner: ConfigFields) -> ConfigFields:
        """The same object with the fields of another laid over its own."""
        return ConfigFields(self.name, {**self._values, **inner._values})

    def replaced(self, **values: object) -> ConfigFields:
        """The same object with other values; None takes a field away."""
        return ConfigFields(self.name, {**self._values, **values})

    def with_defaults(self, **values: object) -> ConfigFields:
        """The same object with values for the fields that it lacks."""
        return ConfigFields(self.name, {**values, **self._values})

    def check_known(self, names: Collection[str]) -> None:
        """Raises ConfigError on a field that would be ignored."""
        unknown = sorted(set(self._values) - set(names))
        if unknown:
            raise ConfigError(f"{self.name}: {', '.join(unknown)} not supported here; known are {', '.join(names)}")

    def _value(self, name: str, default: object) -> object:
        value = self._values.get(name, default)
        if value is None:
            raise ConfigError(f"{self.name}: {name} is missing")
        return value

    def _wrong_type(self, name: str, expected: str, value: object) -> ConfigError:
        return ConfigError(f"{self.name}: {name} must be {expected}, not {value!r}")
