"""Who can reach a listening address, and whether TLS files are what they should be. Opens no socket."""

from __future__ import annotations

import ipaddress
import ssl

from kvrelay_core.errors import ConfigError
from kvrelay_core.rpc.channel import TlsFiles


def is_loopback(host: str) -> bool:
    """False for names that only the resolver knows."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_pem_files(tls: TlsFiles) -> None:
    """Raises ConfigError; gRPC itself would not say what is wrong with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")  # never asks for one
    except (OSError, ValueError) as error:
        files = f"--tls-cert {tls.certificate} and --tls-key {tls.key}"
        raise ConfigError(f"{files} are not a certificate and its key: {error}", field="tls_certificate") from error
    try:
        context.load_verify_locations(tls.ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tls-ca {tls.ca} is no certificate: {error}", field="tls_ca") from error
