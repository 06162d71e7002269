"""What one worker process is told at its start."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from kvrelay_core.errors import ConfigError
from kvrelay_core.rpc.channel import TlsFiles
from kvrelay_core.rpc.exposure import check_pem_files, is_loopback
from kvrelay_engine.config import EngineConfig


class WorkerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`engine` is a template: the worker fills in role, worker_id, address, endpoints and run_dir itself."""

    role: Literal["prefill", "decode", "encoder"]
    worker_id: str
    engine: EngineConfig
    run_dir: str  # for sockets and the engine's configuration file; private to the user
    host: str = "127.0.0.1"
    port: int = 0  # 0: the system chooses
    advertise: str = ""  # host:port at which other workers reach this one; empty: host and the bound port
    # Sources that decode may dial: `host:port`, or `host` for any port of it. Empty: loopback only.
    peers: tuple[str, ...] = ()

    # PEM files, all or none: every caller and every peer must then show a certificate that the CA has signed.
    tls_certificate: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    allow_insecure: bool = False  # listen beyond loopback without TLS

    drain_s: float = 30.0  # how long running requests may take to end after SIGTERM
    start_timeout_s: float = 600.0  # loading a model
    hung_after_s: float = 30.0  # without a word from the engine's loop; a step on a slow CPU may take seconds
    session_grace_s: float = 2.0  # a lost session may come back within
    follow_grace_s: float = 2.0  # a lost source may come back within
    call_timeout_s: float = 5.0  # handshakes and single answers
    fetch_timeout_s: float = 30.0  # one piece of a read over the socket

    @property
    def tls(self) -> TlsFiles | None:
        if not self.tls_certificate:
            return None
        return TlsFiles(Path(self.tls_certificate), Path(self.tls_key), Path(self.tls_ca))

    def validate(self) -> None:
        """Raises ConfigError that names the field and what to change."""
        self._check_address()
        self._check_tls()
        for name in self.__struct_fields__:
            if name.endswith("_s") and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds", field=name)
        if self.engine.staging_slots < 2:
            raise ConfigError("staging_slots must be at least 2: one to send from, one to receive into")

    def _check_address(self) -> None:
        if not self.worker_id or "/" in self.worker_id:
            raise ConfigError("worker_id must be a name without slashes", field="worker_id")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}", field="port")
        if not self.advertise and _is_wildcard(self.host):
            raise ConfigError(
                f"host {self.host} listens everywhere, which is no address to dial; say with --advertise HOST:PORT "
                "where other workers reach this one",
                field="advertise",
            )

    def _check_tls(self) -> None:
        given = [bool(name) for name in (self.tls_certificate, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ConfigError("TLS needs all of --tls-cert, --tls-key and --tls-ca", field="tls_certificate")
        if self.tls is not None:
            check_pem_files(self.tls)
        elif not is_loopback(self.host) and not self.allow_insecure:
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and nobody would be asked for a certificate; "
                "give --tls-cert, --tls-key and --tls-ca, or say --allow-insecure on a network that you trust",
                field="allow_insecure",
            )

    def address_for(self, bound_port: int) -> str:
        """Where other workers reach this one."""
        if self.advertise:
            return self.advertise
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{bound_port}"

    def engine_config(self, address: str, commands_endpoint: str, events_endpoint: str) -> EngineConfig:
        config = msgspec.structs.replace(
            self.engine,
            role=self.role,
            worker_id=self.worker_id,
            address=address,
            commands_endpoint=commands_endpoint,
            events_endpoint=events_endpoint,
            run_dir=self.run_dir,
        )
        config.validate()
        return config


def _is_wildcard(host: str) -> bool:
    if not host:
        return True
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
