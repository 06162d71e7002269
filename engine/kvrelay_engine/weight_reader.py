"""Reads a checkpoint's safetensors straight into tensors of the wanted dtype and device.

Files are memory-mapped; a fused tensor is filled part by part, so that nothing exists twice beyond one part.
It keeps account of what was asked for: `check_complete` names what is missing, of the wrong shape, or left over.
It knows tensor names only as strings, not what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrelay_core.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOAT_TYPES = ("F64", "F32", "BF16", "F16")
_NAMES_SHOWN = 8


class WeightReader:
    """A context manager; `files` is what it reads, sorted."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, *, foreign_prefixes: tuple[str, ...] = ()
    ) -> None:
        """Opens every file. Tensors with a foreign prefix are another's to read: they are as if not there.

        Raises ConfigError where a file is missing or malformed.
        """
        self.files = weight_files(directory)
        self._dtype = dtype
        self._device = device
        self._stack = ExitStack()
        self._handle_of: dict[str, Any] = {}
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []
        try:
            for path in self.files:
                handle = self._stack.enter_context(_open(path))
                own = {name: handle for name in handle.keys() if not name.startswith(foreign_prefixes)}  # noqa: SIM118
                self._handle_of.update(own)
        except ConfigError:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def keep_only(self, prefixes: tuple[str, ...]) -> None:
        """Tensors without one of the prefixes are another's to read: they are as if not there."""
        self._handle_of = {name: handle for name, handle in self._handle_of.items() if name.startswith(prefixes)}

    @property
    def names(self) -> list[str]:
        """Of all tensors that are there, sorted."""
        return sorted(self._handle_of)

    def stored(self, name: str) -> Tensor:
        """The tensor as the file holds it: in its own dtype, on the CPU, not counted as read."""
        tensor: Tensor = self._handle_of[name].get_tensor(name)
        return tensor

    @property
    def size_bytes(self) -> int:
        """Of all tensors of the checkpoint, but foreign ones, in the wanted dtype."""
        shapes: list[list[int]] = [handle.get_slice(name).get_shape() for name, handle in self._handle_of.items()]
        return sum(map(prod, shapes)) * self._dtype.itemsize

    def read(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name, in the wanted dtype where it needs none of its own.

        One that is absent or of another shape is noted and left undefined.
        """
        out = torch.empty(tuple(shape), dtype=dtype or self._dtype, device=self._device)
        self._read_into(out, name)
        return out

    def read_fused(self, names: Sequence[str], rows: Sequence[int], columns: int | None = None) -> Tensor:
        """The tensors [rows[i], columns], or vectors [rows[i]], one after another: [sum(rows), columns]."""
        shape = (sum(rows),) if columns is None else (sum(rows), columns)
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        for part, name in zip(out.split_with_sizes(list(rows)), names, strict=True):
            self._read_into(part, name)
        return out

    def has(self, name: str) -> bool:
        return name in self._handle_of

    def ignore(self, name: str) -> None:
        """The tensor may be there and is not needed."""
        self._used.add(name)

    def check_complete(self) -> None:
        """Raises ConfigError unless exactly the tensors of the checkpoint were read."""
        unexpected = sorted(name for name in self._handle_of if name not in self._used and not _is_harmless(name))
        problems = [
            f"{what}: {_shorten(names)}"
            for what, names in (
                ("missing", self._missing),
                ("wrong", self._wrong),
                ("unexpected", unexpected),
            )
            if names
        ]
        if problems:
            raise ConfigError(
                f"the weights in {self.files[0].parent} do not fit config.json; tensors {'; '.join(problems)}"
            )

    def _read_into(self, out: Tensor, name: str) -> None:
        self._used.add(name)
        handle = self._handle_of.get(name)
        if handle is None:
            self._missing.append(name)
            return
        part = handle.get_slice(name)
        if part.get_dtype() not in _FLOAT_TYPES:
            self._wrong.append(f"{name} is {part.get_dtype()}, not one of {', '.join(_FLOAT_TYPES)}")
        elif part.get_shape() != list(out.shape):
            self._wrong.append(f"{name} has shape {part.get_shape()}, config.json says {list(out.shape)}")
        else:
            out.copy_(handle.get_tensor(name))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted. Raises ConfigError where there are none or one is missing."""
    index = directory / INDEX_FILE
    if index.is_file():
        names = _read_index(index)
    elif (directory / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        raise ConfigError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not supported")
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise ConfigError(f"{INDEX_FILE} names files that are not in {directory}: {', '.join(absent)}")
    return [directory / name for name in names]


def _read_index(path: Path) -> list[str]:
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a safetensors index: {error}") from error
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{path} names a file outside its directory: {name}")
    if not names:
        raise ConfigError(f"{path} names no file")
    return names


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}; download it again") from error


def _is_harmless(name: str) -> bool:
    """Old Llama checkpoints hold the RoPE frequencies, which are computed from config.json."""
    return name.endswith("rotary_emb.inv_freq")


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
