"""`kvrelay serve` turns flags into the configuration of a role."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from kvrelay_cli.commands import serve
from kvrelay_core.errors import ConfigError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


def worker(*words: str) -> Any:
    return serve.worker_config(parse(*words, "--model", "m"), "/run/x")


def test_a_worker_takes_its_engines_defaults_for_what_is_not_said() -> None:
    config = worker("prefill", "--kv-blocks", "40", "--connector", "grpc", "--threads-per-worker", "3")
    assert (config.role, config.run_dir, config.port) == ("prefill", "/run/x", 0)
    assert (config.engine.kv_blocks, config.engine.connectors, config.engine.num_threads) == (40, ("grpc",), 3)
    assert (config.engine.dtype, config.engine.max_num_seqs) == ("auto", 64)
    config.validate()


def test_decode_may_dial_its_peers_only() -> None:
    assert worker("decode", "--peers", "h:1,h:2").peers == ("h:1", "h:2")


def test_tls_files_reach_every_role() -> None:
    words = ("--model", "m", "--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a")
    router: Any = serve.router_config(parse("router", "--decode", "h:2", *words))
    for config in (router, serve.worker_config(parse("decode", *words), "/run/x")):
        assert (config.tls_certificate, config.tls_key, config.tls_ca) == ("c", "k", "a")
        assert not config.allow_insecure


def test_a_gpu_is_chosen_by_number() -> None:
    assert worker("decode", "--device", "cuda", "--device-index", "1").engine.device == "cuda:1"
    with pytest.raises(ConfigError, match="needs --device cuda"):
        worker("decode", "--device-index", "1")


def test_the_router_knows_its_workers() -> None:
    config: Any = serve.router_config(
        parse(
            "router",
            "--model",
            "m",
            "--prefill",
            "h:1",
            "--decode",
            "h:2,h:3",
            "--encoder",
            "h:4,h:5",
            "--served-model-name",
            "name",
            "--media-url-hosts",
            "pics.test, *.cdn.test",
        )
    )
    assert (config.prefill, config.decode, config.served_name) == (["h:1"], ["h:2", "h:3"], "name")
    assert config.encoder == ["h:4", "h:5"]
    assert config.placement == "least_load"
    assert config.media_url_hosts == ["pics.test", "*.cdn.test"]
    config.validate()
