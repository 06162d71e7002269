"""Which roles a cluster on one machine consists of, and the command that starts each.

A pure function of the flags of `kvrelay up` and the chosen ports. Workers listen on loopback only: nobody but the
router and their peers calls them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kvrelay_cli.flags import ROUTER_FLAGS, SHARED_FLAGS, WORKER_FLAGS, require
from kvrelay_cli.role_process import RoleSpec
from kvrelay_core.errors import ConfigError

WORKER_HOST = "127.0.0.1"


def check_released(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags whose part of the system this release does not have."""
    if args.http_port is not None:
        raise ConfigError("--http-port is not available in this release: it speaks gRPC only; use --grpc-port")


def own_executable() -> tuple[str, ...]:
    """The words that start this very program: `kvrelay`, or `python -m kvrelay_cli`."""
    started = Path(sys.argv[0])
    if started.name == "kvrelay" and os.access(started, os.X_OK):
        return (str(started.resolve()),)
    return (sys.executable, "-m", "kvrelay_cli")


def plan_roles(
    args: argparse.Namespace,
    executable: tuple[str, ...],
    run_dir: Path,
    router_port: int,
    worker_ports: list[int],
) -> list[RoleSpec]:
    """One spec per process, router first. `worker_ports` holds prefill's ports, then decode's, then the encoders'."""
    require(args, "--model")
    addresses = [f"{WORKER_HOST}:{port}" for port in worker_ports]
    prefill, rest = addresses[: args.prefill], addresses[args.prefill :]
    decode, encoder = rest[: args.decode], rest[args.decode :]
    router_words = (
        *("--host", args.host, "--grpc-port", str(router_port)),
        *(("--prefill", ",".join(prefill)) if prefill else ()),
        *("--decode", ",".join(decode)),
        *(("--encoder", ",".join(encoder)) if encoder else ()),
        *(("--allow-insecure",) if args.allow_insecure else ()),
        *_passed_on(args, (*SHARED_FLAGS, *ROUTER_FLAGS)),
    )
    specs = [RoleSpec("router", 0, (*executable, "serve", "router", *router_words))]
    sources = {"prefill": [*decode, *encoder], "decode": [*prefill, *decode], "encoder": []}
    for role, workers, devices in (
        ("prefill", prefill, args.prefill_devices),
        ("decode", decode, args.decode_devices),
        ("encoder", encoder, args.encoder_devices),
    ):
        for index, address in enumerate(workers):
            name = f"{role}-{index}"
            words = (
                *("--worker-id", name, "--host", WORKER_HOST, "--grpc-port", address.rpartition(":")[2]),
                *("--run-dir", str(run_dir / name)),
                *_peers([source for source in sources[role] if source != address]),
                *(("--device-index", str(devices[index % len(devices)])) if devices else ()),
                *_passed_on(args, (*SHARED_FLAGS, *WORKER_FLAGS)),
            )
            specs.append(RoleSpec(role, index, (*executable, "serve", role, *words)))
    return specs


def _peers(sources: list[str]) -> tuple[str, ...]:
    """Decode reads hand-offs of prefill, prefill embeddings of the encoders; and both what a decode worker has of a
    conversation's last turn."""
    return ("--peers", ",".join(sources)) if sources else ()


def threads_per_worker(num_workers: int) -> int:
    """An equal share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


def _passed_on(args: argparse.Namespace, flags: tuple[str, ...]) -> tuple[str, ...]:
    words: list[str] = []
    for flag in flags:
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value is not None and value != ():
            words += [flag, _text_of(value)]
    return tuple(words)


def _text_of(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
