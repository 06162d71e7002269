"""Flags that several commands share. `up` passes them on to `serve` under the same names.

A worker flag without a default here is decided by the engine: its `None` is not passed on.
"""

from __future__ import annotations

import argparse

from kvrelay_cli import flag_types
from kvrelay_cli.tier_flags import add_tier_flags
from kvrelay_core.errors import ConfigError

CONNECTORS = ("auto", "cuda_ipc", "shm", "nixl", "ucx", "grpc")
PLACEMENTS = ("least_load", "round_robin")
LOG_LEVELS = ("debug", "info", "warning", "error")

# What `up` hands to every worker as it is.
WORKER_FLAGS = (
    "--device",
    "--connector",
    "--block-tokens",
    "--kv-blocks",
    "--sliding-blocks",
    "--memory-fraction",
    "--max-model-len",
    "--max-num-seqs",
    "--max-batched-tokens",
    "--dtype",
    "--threads-per-worker",
    "--prefix-wait",
    "--digest-share",
    "--embedding-mib",
    "--max-patches",
    "--decode-threads",
    "--host-cache",
    "--disk-cache",
    "--redis-url",
    "--redis-password-file",
    "--cache-secret-file",
    "--cache-codec",
    "--cache-policy",
)
# What `up` hands to the router as it is.
ROUTER_FLAGS = ("--served-model-name", "--api-key-file", "--placement", "--media-url-hosts")
SHARED_FLAGS = ("--model", "--drain-timeout", "--log-level", "--tls-cert", "--tls-key", "--tls-ca")


def connector(text: str) -> str:
    if text not in CONNECTORS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a connector; use {', '.join(CONNECTORS)}")
    return text


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR|ID", help="checkpoint folder, or a model id of the Hugging Face hub")
    parser.add_argument(
        "--drain-timeout",
        type=flag_types.number(0),
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (default 30)",
    )
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="least severe log line (default info)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same names as these flags; flags win")


def add_listen_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--grpc-port",
        type=flag_types.port,
        default=0,
        metavar="PORT",
        help="port to listen on; 0 (default) chooses one",
    )
    parser.add_argument(
        "--allow-insecure", action="store_true", help="listen beyond loopback without asking callers who they are"
    )
    add_tls_flags(parser, "for the front door and between roles; callers must show one that the CA signed")


def add_tls_flags(parser: argparse.ArgumentParser, purpose: str) -> None:
    group = parser.add_argument_group("TLS", f"PEM files, all or none: {purpose}")
    group.add_argument("--tls-cert", metavar="FILE", help="our certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its key")
    group.add_argument("--tls-ca", metavar="FILE", help="the authority whose certificates are accepted")


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workers")
    group.add_argument("--device", type=flag_types.device, default="cpu", metavar="cpu|cuda", help="default cpu")
    group.add_argument(
        "--connector",
        type=connector,
        default="auto",
        metavar="NAME",
        help="how KV cache moves from prefill to decode: auto (default; the fastest that works), shm, grpc, ucx",
    )
    group.add_argument(
        "--block-tokens",
        type=flag_types.integer(1),
        default=64,
        metavar="N",
        help="tokens in a KV block, a power of two (default 64)",
    )
    group.add_argument("--kv-blocks", type=flag_types.integer(2), metavar="N", help="KV blocks in each worker's pool")
    group.add_argument(
        "--sliding-blocks",
        type=flag_types.integer(2),
        metavar="N",
        help="KV blocks of layers with a window, where the model has others too; default what all sequences need",
    )
    group.add_argument(
        "--memory-fraction",
        type=flag_types.number(0.01, 1.0),
        metavar="X",
        help="share of the device's memory for weights and KV, when --kv-blocks is not given",
    )
    group.add_argument(
        "--max-model-len", type=flag_types.integer(1), metavar="N", help="longest prompt plus answer in tokens"
    )
    group.add_argument("--max-num-seqs", type=flag_types.integer(1), metavar="N", help="sequences in one batch")
    group.add_argument(
        "--max-batched-tokens",
        type=flag_types.integer(1),
        metavar="N",
        help="tokens in one step; longer prompts are computed in chunks",
    )
    group.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16")
    group.add_argument(
        "--threads-per-worker", type=flag_types.integer(1), metavar="N", help="CPU threads of each worker's engine"
    )
    group.add_argument(
        "--prefix-wait",
        type=flag_types.number(0.0),
        metavar="SECONDS",
        help="longest wait for KV that others or tiers have of a prompt; 0: never (default: what computing takes)",
    )
    group.add_argument(
        "--digest-share",
        type=flag_types.number(0.0, 1.0),
        metavar="X",
        help="share of KV blocks that are checked to the byte after a hand-off, at some cost (default 0: words alone)",
    )
    _add_image_flags(group)
    add_tier_flags(parser)


def _add_image_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--embedding-mib",
        type=flag_types.integer(1),
        metavar="N",
        help="host memory for embeddings of images, of each encoder and each prefill worker (default 256 MiB)",
    )
    group.add_argument(
        "--max-patches",
        type=flag_types.integer(1),
        metavar="N",
        help="patches of images that an encoder computes in one step (default: what fills the device)",
    )
    group.add_argument(
        "--decode-threads",
        type=flag_types.integer(1),
        metavar="N",
        help="threads that decode images in each encoder (default: half as many as cores, 2 to 8)",
    )


def add_router_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("router")
    group.add_argument(
        "--placement", choices=PLACEMENTS, help="how workers are chosen (default: by outstanding tokens)"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="what requests call the model")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="file with one accepted bearer token a line; without it, no check"
    )
    group.add_argument(
        "--media-url-hosts",
        type=flag_types.names,
        default=(),
        metavar="HOST,...",
        help="from where images may be fetched by URL: HOST, *.DOMAIN, HOST:PORT or * (default: none are)",
    )


def require(args: argparse.Namespace, flag: str) -> str:
    """The value of a flag that may also come from --config, and so cannot be `required` in argparse."""
    value = getattr(args, flag.lstrip("-").replace("-", "_"))
    if not value:
        raise ConfigError(f"{flag} is missing; give it as a flag or in the --config file")
    return str(value)
