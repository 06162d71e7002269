"""Certificates of a CA of the test's own, by the `openssl` program."""

from __future__ import annotations

import subprocess
from pathlib import Path

from kvrelay_core.rpc.channel import TlsFiles

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class CertificateAuthority:
    """`directory` is created and holds everything."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self.certificate = directory / "ca.pem"
        self._key = directory / "ca.key"
        _openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", self._key, "-out", self.certificate, "-days", "1", "-subj",
            f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign",
        )  # fmt: skip

    def issue(self, name: str, host: str = "IP:127.0.0.1") -> TlsFiles:
        """For a server on `host` and for its calls to others."""
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        _openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", key, "-out", certificate, "-days", "1", "-subj", f"/CN={name}",
            "-addext", f"subjectAltName={host}", "-CA", self.certificate, "-CAkey", self._key,
        )  # fmt: skip
        return TlsFiles(certificate, key, self.certificate)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
