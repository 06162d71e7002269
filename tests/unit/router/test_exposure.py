"""Who may call the router, and whom it calls: TLS on both sides, and no open door by accident."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_relay import RelayMaker, tokens
from fake_worker import FakeDecode, FakePrefill, decode_well, prefill_well

from kvrelay_client import AsyncClient, Client, TlsFiles
from kvrelay_core.errors import ConfigError, WorkerLostError
from kvrelay_router.config import RouterConfig


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate for loopback that is its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    files = TlsFiles(folder / "cert.pem", folder / "key.pem", folder / "cert.pem")
    subprocess.run(
        ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=kvrelay", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-days", "2",
         "-keyout", str(files.key), "-out", str(files.certificate)),
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def config(**change: Any) -> RouterConfig:
    return RouterConfig(**{"model": "m", "prefill": ["127.0.0.1:1"], "decode": ["127.0.0.1:2"], **change})


def names(tls: TlsFiles) -> dict[str, Any]:
    return {"tls_certificate": str(tls.certificate), "tls_key": str(tls.key), "tls_ca": str(tls.ca)}


async def test_client_router_and_workers_speak_tls(make_relay: RelayMaker, tls: TlsFiles) -> None:
    prefill, decode = FakePrefill("prefill-0", prefill_well), FakeDecode("decode-0", decode_well)
    prefill.tls = decode.tls = tls
    await prefill.start()
    await decode.start()
    relay = await make_relay.connect([prefill], [decode], **names(tls))
    assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)
    async with AsyncClient(relay.address) as stranger:
        with pytest.raises(WorkerLostError):
            await stranger.complete(token_ids=[1], max_tokens=3, timeout_s=5)


async def test_the_blocking_client_speaks_tls(make_relay: RelayMaker, tls: TlsFiles) -> None:
    prefill, decode = FakePrefill("prefill-0", prefill_well), FakeDecode("decode-0", decode_well)
    prefill.tls = decode.tls = tls
    await prefill.start()
    await decode.start()
    relay = await make_relay.connect([prefill], [decode], **names(tls))

    def ask() -> list[int]:
        with Client(relay.address, tls=tls) as client:
            return client.complete(token_ids=[1], max_tokens=3).token_ids

    assert await asyncio.to_thread(ask) == tokens(3)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    config(host=host).validate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "router.example"])
def test_elsewhere_callers_are_asked_who_they_are(host: str, tls: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        config(host=host).validate()
    config(host=host, api_key_file="keys").validate()
    config(host=host, **names(tls)).validate()
    config(host=host, allow_insecure=True).validate()


def test_tls_files_that_cannot_work(tls: TlsFiles, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for change, words in (
        ({"tls_ca": ""}, "all of --tls-cert"),
        ({"tls_certificate": ""}, "all of --tls-cert"),
        ({"tls_key": str(tmp_path / "absent")}, "not a certificate and its key"),
        ({"tls_certificate": str(empty)}, "not a certificate and its key"),
        ({"tls_ca": str(empty)}, "is no certificate"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**{**names(tls), **change}).validate()
