"""Passing a segment's descriptor over a Unix socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer import descriptor_server
from kvrelay_transfer.descriptor_server import DescriptorServer, fetch_descriptor
from kvrelay_transfer.memfd import create_memfd


def same_file(first: int, second: int) -> bool:
    return os.fstat(first).st_ino == os.fstat(second).st_ino


def test_a_peer_gets_the_descriptor_as_often_as_it_asks(tmp_path: Path) -> None:
    fd = create_memfd("test", 4096, "")
    server = DescriptorServer(tmp_path / "pool.sock", fd)
    for _ in range(3):
        received = fetch_descriptor(str(server.path))
        assert received != fd and same_file(received, fd)
        os.close(received)
    server.close()
    os.close(fd)


def test_closing_removes_the_socket_file(tmp_path: Path) -> None:
    fd = create_memfd("test", 4096, "")
    server = DescriptorServer(tmp_path / "pool.sock", fd)
    server.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TransferError, match=r"pool\.sock"):
        fetch_descriptor(str(tmp_path / "pool.sock"))
    os.close(fd)


def test_a_file_left_by_a_killed_owner_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pool.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_behind:
        left_behind.bind(str(path))
    with pytest.raises(TransferError):
        fetch_descriptor(str(path))
    fd = create_memfd("test", 4096, "")
    server = DescriptorServer(path, fd)
    received = fetch_descriptor(str(path))
    assert same_file(received, fd)
    server.close()
    os.close(received)
    os.close(fd)


def test_another_user_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = create_memfd("test", 4096, "")
    server = DescriptorServer(tmp_path / "pool.sock", fd)
    ours = os.geteuid()
    answers = iter([ours, ours + 1])  # what the client, then the server, is told of the other

    def uid_of_peer(connection: socket.socket) -> int:
        return next(answers)

    with monkeypatch.context() as patch:
        patch.setattr(descriptor_server, "peer_uid", uid_of_peer)
        with pytest.raises(TransferError):
            fetch_descriptor(str(server.path))
    server.close()
    os.close(fd)


def test_an_owner_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = create_memfd("test", 4096, "")
    server = DescriptorServer(tmp_path / "pool.sock", fd)
    with monkeypatch.context() as patch:
        patch.setattr(descriptor_server, "peer_uid", lambda connection: os.geteuid() + 1)
        with pytest.raises(TransferError, match="another user"):
            fetch_descriptor(str(server.path))
    server.close()
    os.close(fd)


def test_a_path_too_long_for_a_socket_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--run-dir"):
        DescriptorServer(tmp_path / ("x" * 120), 0)
