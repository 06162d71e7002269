"""What a router is told at its start. Knows flags and limits; not how they are parsed from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.url_rules import UrlRules
from kvrelay_core.rpc.channel import TlsFiles
from kvrelay_core.rpc.exposure import check_pem_files, is_loopback


class RequestLimits(Struct, frozen=True, kw_only=True):
    """Bounds of what one request may ask for. Each error message names the bound."""

    max_choices: int = 16
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_name_chars: int = 256  # request_id, session_id, cache_salt
    max_concurrent: int = 4096  # requests in progress in this router


class RouterConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str  # a local folder or a hub id; the router reads its tokenizer and generation defaults
    prefill: list[str]  # host:port of each prefill worker; empty: decode workers compute prompts too
    decode: list[str]
    encoder: list[str] = []  # of each encoder; empty: requests with images are refused
    host: str = "127.0.0.1"
    port: int = 0  # 0: the system chooses
    served_model_name: str | None = None  # None: `model`
    placement: Literal["least_load", "round_robin"] = "least_load"
    api_key_file: str | None = None  # one accepted bearer token a line; None: no check
    # PEM files, all or none: for the front door and the channels to workers alike. Callers must then show a
    # certificate that the CA has signed.
    tls_certificate: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    allow_insecure: bool = False  # listen beyond loopback without asking callers who they are
    drain_s: float = 30.0  # how long running requests may go on after SIGTERM
    max_replacements: int = 1  # placements of one request after a lost hand-off or decode worker
    max_unsent_tokens: int = 8192  # tokens that a slow client may be behind before it is cancelled
    slow_client_s: float = 30.0  # how long one message may wait for the client
    reattach_s: float = 2.0  # how long a lost session with a worker may take to come back
    placement_wait_s: float = 5.0  # how long a request waits for a role of which no worker serves
    refused_wait_s: float = 2.0  # how long it waits when no decode worker has room for its KV
    encode_s: float = 30.0  # how long one encoder may take for one request's images
    media_url_hosts: list[str] = []  # from where images may be fetched (url_rules.py); empty: no URLs but data:
    media_url_s: float = 10.0  # how long it may take to fetch one
    reflection: bool = True
    limits: RequestLimits = RequestLimits()
    media_limits: MediaLimits = MediaLimits()

    @property
    def served_name(self) -> str:
        return self.served_model_name or self.model

    @property
    def tls(self) -> TlsFiles | None:
        if not self.tls_certificate:
            return None
        return TlsFiles(Path(self.tls_certificate), Path(self.tls_key), Path(self.tls_ca))

    def validate(self) -> None:
        """Raises ConfigError that names the field and what to change."""
        if not self.model:
            raise ConfigError("model must not be empty", field="model")
        if not self.decode:
            raise ConfigError("no decode worker; list at least one HOST:PORT", field="decode")
        _check_addresses("prefill", self.prefill)
        _check_addresses("decode", self.decode)
        _check_addresses("encoder", self.encoder)
        self.media_limits.validate()
        UrlRules(tuple(self.media_url_hosts))
        workers = [*self.prefill, *self.decode, *self.encoder]
        if len(set(workers)) != len(workers):
            raise ConfigError("a worker address is listed twice; each process has one role", field="prefill")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}", field="port")
        self._check_exposure()
        for name in ("drain_s", "max_replacements", "placement_wait_s", "refused_wait_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative", field=name)
        for name in ("max_unsent_tokens", "slow_client_s", "reattach_s", "encode_s", "media_url_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0", field=name)

    def _check_exposure(self) -> None:
        given = [bool(name) for name in (self.tls_certificate, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ConfigError("TLS needs all of --tls-cert, --tls-key and --tls-ca", field="tls_certificate")
        if self.tls is not None:
            check_pem_files(self.tls)
        elif not (self.api_key_file or self.allow_insecure or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and nobody would be asked for a key or a "
                "certificate; give --api-key-file, or --tls-cert, --tls-key and --tls-ca, or say --allow-insecure on "
                "a network that you trust",
                field="allow_insecure",
            )


def _check_addresses(role: str, addresses: list[str]) -> None:
    for address in addresses:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"{role} worker {address!r} is not HOST:PORT", field=role)
