"""Which tiers a worker has: a part of its configuration, that names the files of secrets and never holds one.

Torch-free: services write it, engines read it.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from kvrelay_core.errors import ConfigError

PASSWORD_VARIABLE = "KVRELAY_REDIS_PASSWORD"
SECRET_BYTES = 32
CODECS = ("none", "zstd", "fp8")
POLICIES = ("lru", "s3-fifo")


class TierConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing given: no tiers. Host memory is each worker's own; the others are shared by all who name the same."""

    host_bytes: int | None = None  # None: as much as parts move through, if there is a tier below it
    disk_dir: str = ""
    disk_bytes: int = 0
    redis_url: str = ""  # without a password
    redis_password_file: str = ""
    codec: str = "none"  # of parts below host memory; fp8 is not lossless
    policy: str = "lru"  # who goes first where host memory is full
    secret_file: str = ""  # of keys and checksums: who does not have it can neither ask for parts nor make any

    @property
    def is_shared(self) -> bool:
        """Whether there is a tier that outlives the worker."""
        return bool(self.disk_dir or self.redis_url)

    @property
    def is_on(self) -> bool:
        return self.is_shared or bool(self.host_bytes)

    def validate(self) -> None:
        """Raises ConfigError that names the flag."""
        if self.host_bytes is not None and self.host_bytes < 0:
            raise ConfigError("--host-cache must not be negative", field="host_bytes")
        if bool(self.disk_dir) != (self.disk_bytes > 0):
            raise ConfigError("--disk-cache needs a folder and a size: DIR:20GiB", field="disk_dir")
        for flag, value, known in (("--cache-codec", self.codec, CODECS), ("--cache-policy", self.policy, POLICIES)):
            if value not in known:
                raise ConfigError(f"{flag} must be {', '.join(known)}, not {value!r}")
        if self.redis_password_file and not self.redis_url:
            raise ConfigError("--redis-password-file is for --redis-url", field="redis_password_file")
        if "@" in self.redis_url and _has_password(self.redis_url):
            raise ConfigError(
                "everybody on this machine can read the password in --redis-url; put it into a file and give "
                f"--redis-password-file, or into the environment as {PASSWORD_VARIABLE}",
                field="redis_url",
            )

    def read_password(self) -> str:
        """Of Redis; empty: none. Raises ConfigError."""
        if not self.redis_password_file:
            return os.environ.get(PASSWORD_VARIABLE, "")
        return _read(self.redis_password_file, "--redis-password-file").decode().rstrip("\r\n")

    def read_secret(self) -> bytes:
        """32 bytes, or none. Raises ConfigError."""
        if not self.secret_file:
            return b""
        found = _read(self.secret_file, "--cache-secret-file")
        try:
            secret = found if len(found) == SECRET_BYTES else bytes.fromhex(found.decode())
        except ValueError:
            secret = b""
        if len(secret) != SECRET_BYTES:
            raise ConfigError(
                f"--cache-secret-file {self.secret_file} must hold {SECRET_BYTES} bytes, as they are or in "
                "hexadecimal digits, as `openssl rand -hex 32` prints them",
                field="secret_file",
            )
        return secret


def _has_password(url: str) -> bool:
    _, colon, _ = urlsplit(url).netloc.rpartition("@")[0].partition(":")
    return bool(colon)


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {flag} {path}: {error.strerror}") from error
