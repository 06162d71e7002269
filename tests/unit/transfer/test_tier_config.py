"""Which tiers a worker gets, what is refused, and that no secret is where others can read it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import ConfigError
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.make import kv_keys, make_codec, make_kv_chain
from kvrelay_transfer.tiers.tier_config import CODECS, PASSWORD_VARIABLE, TierConfig

LAYOUT = KvLayout("float32", num_layers=2, num_kv_heads=2, block_tokens=16, head_dim=8)
SECRET = bytes(range(32))


def test_nothing_given_is_no_tier() -> None:
    assert not TierConfig().is_on and not TierConfig(host_bytes=0).is_on
    assert TierConfig(host_bytes=1).is_on and not TierConfig(host_bytes=1).is_shared
    assert TierConfig(redis_url="redis://h").is_shared


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"host_bytes": -1}, "--host-cache"),
        ({"codec": "zip"}, "--cache-codec"),
        ({"policy": "fifo"}, "--cache-policy"),
        ({"disk_dir": "d"}, "--disk-cache"),
        ({"disk_bytes": 1}, "--disk-cache"),
        ({"redis_password_file": "f"}, "--redis-url"),
        ({"redis_url": "redis://me:secret@h"}, "--redis-password-file"),
        ({"redis_url": "redis://:secret@h"}, PASSWORD_VARIABLE),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_flag(fields: dict[str, object], flag: str) -> None:
    config = msgspec.convert(fields, TierConfig)
    with pytest.raises(ConfigError, match=flag) as caught:
        config.validate()
    assert "secret@" not in caught.value.message


def test_a_user_without_a_password_is_no_secret() -> None:
    TierConfig(redis_url="redis://me@h:1/2").validate()


def test_a_password_comes_from_its_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert TierConfig().read_password() == ""
    monkeypatch.setenv(PASSWORD_VARIABLE, "of the environment")
    assert TierConfig().read_password() == "of the environment"
    path = tmp_path / "password"
    path.write_text("of the file\n")
    assert TierConfig(redis_password_file=str(path)).read_password() == "of the file"
    with pytest.raises(ConfigError, match="--redis-password-file"):
        TierConfig(redis_password_file=str(tmp_path / "none")).read_password()


@pytest.mark.parametrize("content", [SECRET, SECRET.hex().encode(), SECRET.hex().encode() + b"\n"])
def test_a_secret_is_32_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    assert TierConfig(secret_file=str(path)).read_secret() == SECRET


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 31, b"x" * 64, SECRET.hex().encode()[:-2]])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="openssl rand"):
        TierConfig(secret_file=str(path)).read_secret()


@pytest.mark.parametrize("codec", CODECS)
def test_the_chain_has_what_the_configuration_says(tmp_path: Path, codec: str) -> None:
    place = {"disk_dir": str(tmp_path / "kv"), "disk_bytes": 1 << 20}
    config = msgspec.convert({"host_bytes": 1 << 20, "codec": codec, "policy": "s3-fifo", **place}, TierConfig)
    chain = make_kv_chain(config, KvChunks.of(LAYOUT), ManualClock(), is_pinned=False)
    assert [tier.name for tier in chain.stats().tiers] == ["host", "disk"]
    chain.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_scales_each_vector(dtype: str) -> None:
    """So that one token's outlier does not cost the others of its chunk their digits."""
    chunks = KvChunks.of(msgspec.structs.replace(LAYOUT, dtype=dtype))
    codec = make_codec("fp8", chunks)
    assert codec is not None and make_codec("none", chunks) is None
    raw = memoryview(bytearray(chunks.part_bytes[0]))
    num_vectors = len(raw) // ELEMENT_BYTES[dtype] // LAYOUT.head_dim
    assert codec.encode(raw, memoryview(bytearray(len(raw)))) == num_vectors * (4 + LAYOUT.head_dim)


def keys_of(*, secret: bytes = b"", fingerprint: bytes = b"model", codec: str = "none", **changes: object) -> bytes:
    chunks = KvChunks.of(msgspec.structs.replace(LAYOUT, **changes))
    return kv_keys(chunks, fingerprint, codec, secret).namespace


def test_keys_tell_everything_but_the_size_of_blocks() -> None:
    same = keys_of()
    assert keys_of(block_tokens=64) == same
    others = [
        keys_of(secret=SECRET), keys_of(fingerprint=b"other"), keys_of(dtype="bfloat16"), keys_of(num_layers=3),
        keys_of(num_kv_heads=1), keys_of(head_dim=16), keys_of(tp_size=2), keys_of(tp_size=2, tp_rank=1),
        keys_of(window=32), keys_of(block_tokens=512), keys_of(codec="fp8"),
    ]  # fmt: skip
    assert len({same, *others}) == 1 + len(others)
