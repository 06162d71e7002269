"""`kvrelay serve ROLE`: one process of a cluster. Translates flags into the role's configuration and runs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay_cli import flag_types
from kvrelay_cli.flags import (
    add_listen_flags,
    add_router_flags,
    add_shared_flags,
    add_worker_flags,
    require,
)
from kvrelay_cli.tier_flags import tier_config
from kvrelay_core.errors import ConfigError

if TYPE_CHECKING:
    from kvrelay_engine.config import EngineConfig
    from kvrelay_router.config import RouterConfig
    from kvrelay_worker.config import WorkerConfig

EPILOG = """\
Prints one line, `ready grpc=HOST:PORT`, when it serves. SIGTERM lets running requests finish, then ends.
`kvrelay serve ROLE --help` shows the flags of a role.

examples:
  kvrelay serve prefill --model ./my-model --grpc-port 50061
  kvrelay serve decode  --model ./my-model --grpc-port 50062 --peers 127.0.0.1:50061
  kvrelay serve router  --model ./my-model --grpc-port 50051 --prefill 127.0.0.1:50061 --decode 127.0.0.1:50062
"""

_ROLES = {
    "router": "place requests on workers and answer clients",
    "prefill": "turn prompts into KV cache and first tokens",
    "decode": "pull KV cache from prefill and generate the rest",
    "encoder": "turn images into embeddings that prefill reads",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    roles = parser.add_subparsers(dest="role", metavar="ROLE", title="roles", required=True)
    for role, summary in _ROLES.items():
        child = roles.add_parser(
            role, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        child.set_defaults(leaf_parser=child)
        add_shared_flags(child)
        add_listen_flags(child)
        if role == "router":
            _add_worker_addresses(child)
            add_router_flags(child)
        else:
            _add_worker_identity(child)
            add_worker_flags(child)


def _add_worker_addresses(parser: argparse.ArgumentParser) -> None:
    for role, text in (
        ("prefill", "the prefill workers; without any, decode workers compute prompts too"),
        ("decode", "the decode workers"),
        ("encoder", "the encoders; without any, requests with images are refused"),
    ):
        parser.add_argument(f"--{role}", type=flag_types.addresses, default=(), metavar="HOST:PORT,...", help=text)


def _add_worker_identity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker-id", metavar="NAME", help="unique in the cluster (default: role and port)")
    parser.add_argument("--run-dir", metavar="DIR", help="private folder for sockets (default: a temporary one)")
    parser.add_argument("--advertise", default="", metavar="HOST:PORT", help="where other workers reach this one")
    parser.add_argument(
        "--peers",
        type=flag_types.addresses,
        default=(),
        metavar="HOST:PORT,...",
        help="workers that this one may read KV from (default: any on loopback)",
    )
    parser.add_argument(
        "--device-index", type=flag_types.integer(0), metavar="I", help="which GPU (with --device cuda)"
    )


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(
        stream=sys.stderr, level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    require(args, "--model")
    # A role starts its engine by exec; gRPC's own handling of forks is not needed and complains.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    if args.role == "router":
        from kvrelay_router import main as router

        return _run(router.serve(router_config(args)))
    if args.run_dir is not None:
        Path(args.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        return _run(_serve_worker(worker_config(args, args.run_dir)))
    with tempfile.TemporaryDirectory(prefix=f"kvrelay-{args.role}-") as run_dir:
        return _run(_serve_worker(worker_config(args, run_dir)))


def router_config(args: argparse.Namespace) -> RouterConfig:
    from kvrelay_router.config import RouterConfig

    require(args, "--decode")
    given = {"placement": args.placement, "served_model_name": args.served_model_name}
    return RouterConfig(
        host=args.host,
        port=args.grpc_port,
        model=args.model,
        prefill=list(args.prefill),
        decode=list(args.decode),
        encoder=list(args.encoder),
        api_key_file=args.api_key_file,
        media_url_hosts=list(args.media_url_hosts),
        drain_s=args.drain_timeout,
        **_exposure(args),
        **_without_none(given),
    )


def worker_config(args: argparse.Namespace, run_dir: str) -> WorkerConfig:
    from kvrelay_worker.config import WorkerConfig

    return WorkerConfig(
        role=args.role,
        worker_id=args.worker_id or f"{args.role}-{args.grpc_port}",
        engine=_engine_config(args),
        run_dir=run_dir,
        host=args.host,
        port=args.grpc_port,
        advertise=args.advertise,
        peers=args.peers,
        drain_s=max(args.drain_timeout, 0.001),
        **_exposure(args),
    )


def _exposure(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "tls_certificate": args.tls_cert or "",
        "tls_key": args.tls_key or "",
        "tls_ca": args.tls_ca or "",
        "allow_insecure": args.allow_insecure,
    }


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    """What the flags say; the worker fills in who and where it is."""
    from kvrelay_engine.config import EngineConfig

    device = args.device
    if args.device_index is not None:
        if device != "cuda":
            raise ConfigError(f"--device-index {args.device_index} needs --device cuda, not {device}")
        device = f"cuda:{args.device_index}"
    given = {
        "dtype": args.dtype,
        "num_threads": args.threads_per_worker,
        "kv_blocks": args.kv_blocks,
        "sliding_blocks": args.sliding_blocks,
        "memory_fraction": args.memory_fraction,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_batched_tokens": args.max_batched_tokens,
        "prefix_wait_s": args.prefix_wait,
        "digest_share": args.digest_share,
        "embedding_bytes": None if args.embedding_mib is None else args.embedding_mib << 20,
        "max_patches": args.max_patches,
        "decode_threads": args.decode_threads,
    }
    return EngineConfig(
        role=args.role,
        model=args.model,
        worker_id="",
        address="",
        commands_endpoint="",
        events_endpoint="",
        run_dir="",
        device=device,
        connectors=(args.connector,),
        block_tokens=args.block_tokens,
        tiers=tier_config(args),
        **_without_none(given),
    )


def _serve_worker(config: WorkerConfig) -> Coroutine[Any, Any, int]:
    if config.role == "prefill":
        from kvrelay_prefill import main as prefill

        return prefill.serve(config)
    if config.role == "encoder":
        from kvrelay_encoder import main as encoder

        return encoder.serve(config)
    from kvrelay_decode import main as decode

    return decode.serve(config)


def _run(service: Coroutine[Any, Any, int]) -> int:
    """Until the role ends; returns its exit code."""
    import uvloop

    code: int = uvloop.run(service)
    return code


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
