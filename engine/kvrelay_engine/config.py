"""What an engine process is told at its start: one JSON object, checked before anything heavy is imported.

Torch-free, so that services write it and engines read it. Knows flags and files; not what they cost.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.layout import ELEMENT_BYTES
from kvrelay_transfer.ticket import LeaseTerms
from kvrelay_transfer.tiers.tier_config import TierConfig

DTYPES = ("auto", *(name for name in ELEMENT_BYTES if not name.startswith("float8")))
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of one engine process. `None` means: decided at start from the model and the machine.

    The service binds both ZeroMQ endpoints (PUSH for commands, PULL for events); the engine connects to them
    and exits when the service's end goes away.
    """

    role: Literal["prefill", "decode", "encoder"]
    model: str  # a local directory or a hub id
    worker_id: str
    address: str  # host:port of the worker's gRPC server, as its peers dial it
    commands_endpoint: str
    events_endpoint: str
    run_dir: str

    device: str = "cpu"
    dtype: str = "auto"
    num_threads: int = 1
    connectors: tuple[str, ...] = ("auto",)  # best first; auto is what suits the device

    block_tokens: int = 64
    hash_unit_tokens: int = 64
    kv_blocks: int | None = None  # blocks of the pool; excludes memory_fraction
    sliding_blocks: int | None = None  # of the pool for layers with a window, where there are others too
    memory_fraction: float | None = None  # of the device's memory, that this worker uses in all
    max_model_len: int | None = None  # prompt and output, tokens

    max_num_seqs: int = 64  # sequences that run at once
    max_batched_tokens: int | None = None  # tokens computed in one step
    decode_alone_tokens: int = 512  # up to here a decode engine recomputes by itself
    recompute_tokens: int = 8192  # cap of the tokens that wait for such a recompute
    step_target_s: float = 1.0  # steps are cut so as to take no longer: beats go out between them
    patience_s: float = 30.0  # a request that waited longer goes first, whatever its deadline

    max_pinned_share: float = 0.8  # of the pool, by the tickets of this engine
    reserve_budget_s: float = 2.0  # how long a hand-off may wait for blocks before it is refused
    prefix_wait_s: float | None = None  # for KV of others and of tiers; None: as long as computing takes; 0: never
    resume_timeout_s: float = 10.0  # how long a lost hand-off waits for Resume or Abort
    lease: LeaseTerms = LeaseTerms()
    digest_share: float = 0.0  # of sealed blocks, that readers can check to the byte
    staging_slots: int = 8  # of the ring between this process and its service
    tiers: TierConfig = TierConfig()  # where KV lives on when the pool has no room for it

    # In host memory: an encoder's cache of embeddings; a prefill worker's pool to read them into, where its model takes
    # images.
    embedding_bytes: int = 256 << 20
    max_patches: int | None = None  # that an encoder computes in one step; an image of more is computed alone
    decode_threads: int | None = None  # of an encoder, for images
    decoded_bytes: int = 1 << 30  # that images may take from their decoding to their encoding; a larger one goes alone

    @property
    def tokens_per_step(self) -> int:
        """At most: `max_batched_tokens`, or what fills the device. A slow one gets fewer (`step_budget.py`)."""
        if self.max_batched_tokens is not None:
            return self.max_batched_tokens
        return max(self.max_num_seqs, 512 if self.device == "cpu" else 8192)

    @property
    def patches_per_step(self) -> int:
        """`max_patches`, or what fills the device."""
        if self.max_patches is not None:
            return self.max_patches
        return 4096 if self.device == "cpu" else 65536

    @property
    def num_decode_threads(self) -> int:
        """`decode_threads`, or one for every second core. Two at least: a small image does not wait for a large one."""
        if self.decode_threads is not None:
            return self.decode_threads
        return max(2, min(8, len(os.sched_getaffinity(0)) // 2))

    def validate(self) -> None:
        """Raises ConfigError that names the field and what to change."""
        self._check_names()
        self._check_sizes()
        self._check_shares_and_times()
        self.tiers.validate()

    def _check_names(self) -> None:
        for name in ("model", "worker_id", "address", "run_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must not be empty", field=name)
        for name in ("commands_endpoint", "events_endpoint"):
            if "://" not in getattr(self, name):
                raise ConfigError(f"{name} must be a ZeroMQ endpoint such as ipc:///run/kvrelay/x", field=name)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}", field="dtype")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:N, not {self.device!r}", field="device")

    def _check_sizes(self) -> None:
        for name in ("block_tokens", "hash_unit_tokens"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ConfigError(f"{name} must be a power of two, not {value}", field=name)
        for name in (
            "num_threads",
            "max_num_seqs",
            "staging_slots",
            "embedding_bytes",
            "patches_per_step",
            "decoded_bytes",
            "num_decode_threads",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}", field=name)
        for name in ("decode_alone_tokens", "recompute_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative", field=name)
        if self.tokens_per_step < self.max_num_seqs:
            raise ConfigError(
                f"max_batched_tokens ({self.tokens_per_step}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs one token of each step",
                field="max_batched_tokens",
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError("max_model_len must be at least 2: one token in, one out", field="max_model_len")
        for name in ("kv_blocks", "sliding_blocks"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2: block 0 is never used", field=name)

    def _check_shares_and_times(self) -> None:
        if self.kv_blocks is not None and self.memory_fraction is not None:
            raise ConfigError("give kv_blocks or memory_fraction, not both", field="memory_fraction")
        for name in ("memory_fraction", "max_pinned_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {value}", field=name)
        if not 0 <= self.digest_share <= 1:
            raise ConfigError(f"digest_share must be from 0 to 1, not {self.digest_share}", field="digest_share")
        for name in ("step_target_s", "patience_s", "reserve_budget_s", "resume_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds", field=name)
        if self.prefix_wait_s is not None and not self.prefix_wait_s >= 0:
            raise ConfigError("prefix_wait_s must be 0 or more seconds", field="prefix_wait_s")

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


def load_config(source: str) -> EngineConfig:
    """From JSON text, or from a file that holds it. Raises ConfigError."""
    text = source if source.lstrip().startswith("{") else _read(Path(source))
    try:
        config = msgspec.json.decode(text, type=EngineConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"engine configuration: {error}") from error
    config.validate()
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the engine configuration {path}: {error.strerror}") from error
