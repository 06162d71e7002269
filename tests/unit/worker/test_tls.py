"""Two workers that speak mTLS with each other, and what keeps a worker from listening to everybody by mistake."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import CertificateAuthority
from worker_rig import make_attempt, make_config, make_generation, make_ticket, running_worker

from kvrelay.v1 import decode_pb2, decode_pb2_grpc, kv_source_pb2, kv_source_pb2_grpc
from kvrelay_core.errors import ConfigError, WorkerLostError
from kvrelay_core.rpc.channel import TlsFiles, open_channel
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole
from kvrelay_worker.wire import ticket_to_wire

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


def config_of(files: TlsFiles) -> dict[str, Any]:
    return {"tls_certificate": str(files.certificate), "tls_key": str(files.key), "tls_ca": str(files.ca)}


@needs_openssl
async def test_a_handoff_over_mutual_tls(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path / "ca")
    async with (
        running_worker(PrefillRole, **config_of(authority.issue("prefill"))) as source,
        running_worker(DecodeRole, **config_of(authority.issue("decode"))) as reader,
    ):
        ticket = make_ticket(source.engine, source.address)
        call = decode_pb2_grpc.DecodeServiceStub(reader.channel).Decode()
        start = decode_pb2.DecodeStart(
            attempt=make_attempt(), generation=make_generation(12), ticket=ticket_to_wire(ticket)
        )
        await call.write(decode_pb2.DecodeRequest(start=start))
        attach = await source.engine.expect(messages.FollowAttach)
        source.engine.dispatch(messages.FollowAttached(attach.follow, ticket.lease))
        source.engine.dispatch(messages.FollowReady(attach.follow, (2,)))
        assert (await reader.engine.expect(messages.HandoffReady)).num_blocks == (2,)
        call.cancel()
        await reader.engine.expect(messages.Abort)


@needs_openssl
@pytest.mark.parametrize("caller", ["of another CA", "without a certificate", "in plain text"])
async def test_a_stranger_is_not_served(tmp_path: Path, caller: str) -> None:
    authority = CertificateAuthority(tmp_path / "ca")
    other = CertificateAuthority(tmp_path / "other", "other CA").issue("stranger")
    strangers: dict[str, Callable[[str], grpc.aio.Channel]] = {
        "of another CA": partial(open_channel, tls=TlsFiles(other.certificate, other.key, authority.certificate)),
        "without a certificate": partial(
            grpc.aio.secure_channel, credentials=grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        ),
        "in plain text": open_channel,
    }
    async with running_worker(PrefillRole, **config_of(authority.issue("prefill"))) as source:
        stub: Any = kv_source_pb2_grpc.KvSourceServiceStub(source.channel)
        assert (await stub.Connect(kv_source_pb2.ConnectRequest())).engine_epoch == source.engine.epoch
        async with strangers[caller](source.address) as channel:
            stub = kv_source_pb2_grpc.KvSourceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.Connect(kv_source_pb2.ConnectRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@needs_openssl
async def test_a_reader_does_not_talk_to_a_source_of_another_ca(tmp_path: Path) -> None:
    source_files = CertificateAuthority(tmp_path / "ca").issue("prefill")
    reader_files = CertificateAuthority(tmp_path / "other", "other CA").issue("decode")
    async with (
        running_worker(PrefillRole, **config_of(source_files)) as source,
        running_worker(DecodeRole, call_timeout_s=0.5, **config_of(reader_files)) as reader,
    ):
        with pytest.raises(WorkerLostError):
            await reader.role.peers.connect(make_ticket(source.engine, source.address))
        assert reader.engine.sent_of(messages.ConnectPeer) == []


@needs_openssl
def test_files_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path / "ca")
    first, second = config_of(authority.issue("first")), config_of(authority.issue("second"))
    make_config("prefill", **first).validate()
    with pytest.raises(ConfigError, match="not a certificate and its key"):
        make_config("prefill", **first | {"tls_key": second["tls_key"]}).validate()
    with pytest.raises(ConfigError, match="--tls-ca"):
        make_config("prefill", **first | {"tls_ca": second["tls_key"]}).validate()
    with pytest.raises(ConfigError, match="No such file"):
        make_config("prefill", **first | {"tls_certificate": str(tmp_path / "none")}).validate()


@pytest.mark.parametrize("field", ["tls_certificate", "tls_key", "tls_ca"])
def test_tls_takes_all_three_files_or_none(field: str) -> None:
    with pytest.raises(ConfigError, match="needs all of"):
        make_config("prefill", **{field: "file.pem"}).validate()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker-1"])
def test_beyond_loopback_one_has_to_ask_for_no_tls(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-insecure"):
        make_config("prefill", host=host, advertise="worker-1:80").validate()
    make_config("prefill", host=host, advertise="worker-1:80", allow_insecure=True).validate()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1", "localhost"])
def test_on_loopback_nothing_is_asked(host: str) -> None:
    make_config("prefill", host=host).validate()
