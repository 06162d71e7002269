"""`kvrelay up`: a whole cluster on this machine, each role the very `kvrelay serve` process one would start by hand."""

from __future__ import annotations

import argparse
import asyncio
import sys

from kvrelay_cli import flag_types
from kvrelay_cli.flags import add_listen_flags, add_router_flags, add_shared_flags, add_worker_flags
from kvrelay_cli.ports import choose_ports
from kvrelay_cli.role_process import RoleProcess
from kvrelay_cli.run_directory import RunDirectory
from kvrelay_cli.supervisor import Supervisor
from kvrelay_cli.topology import WORKER_HOST, check_released, own_executable, plan_roles, threads_per_worker
from kvrelay_core.clock import MonotonicClock

EPILOG = """\
Prints one line, `ready grpc=HOST:PORT`, when it serves; everything the roles say goes to stderr. Ctrl-C or SIGTERM
lets running requests finish and stops every process; a second one kills. A role that dies is started again.

examples:
  kvrelay up --model ./my-model
  kvrelay up --model ./my-model --prefill 2 --decode 2 --grpc-port 50051
  kvrelay up --model meta-llama/Llama-3.2-1B --device cuda --prefill-devices 0 --decode-devices 1
  kvrelay up --model Qwen/Qwen2.5-VL-3B-Instruct --encoder 1
  kvrelay up --config cluster.toml --log-level warning

cluster.toml:
  model = "./my-model"
  prefill = 2
  kv-blocks = 4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_flags(parser)
    add_listen_flags(parser)
    parser.add_argument(
        "--prefill",
        type=flag_types.integer(0, 64),
        default=1,
        metavar="N",
        help="prefill workers (default 1; with 0, decode workers compute prompts too)",
    )
    parser.add_argument(
        "--decode", type=flag_types.integer(1, 64), default=1, metavar="N", help="decode workers (default 1)"
    )
    parser.add_argument(
        "--encoder",
        type=flag_types.integer(0, 64),
        default=0,
        metavar="N",
        help="encoder workers, for models that take images (default 0: requests with images are refused)",
    )
    for role in ("prefill", "decode", "encoder"):
        parser.add_argument(
            f"--{role}-devices",
            type=flag_types.device_indices,
            metavar="I,J",
            help=f"GPU of each {role} worker, in turn (with --device cuda)",
        )
    parser.add_argument(
        "--start-timeout",
        type=flag_types.number(1),
        default=600.0,
        metavar="SECONDS",
        help="how long loading may take until every role serves (default 600)",
    )
    add_worker_flags(parser)
    add_router_flags(parser)
    later = parser.add_argument_group("not available in this release")
    later.add_argument("--http-port", type=flag_types.port, metavar="PORT", help="port of the OpenAI HTTP API")


def run(args: argparse.Namespace) -> int:
    check_released(args)
    num_workers = args.prefill + args.decode + args.encoder
    if args.threads_per_worker is None and args.device == "cpu":
        args.threads_per_worker = threads_per_worker(num_workers)
    router_port = args.grpc_port or choose_ports(args.host, 1)[0]
    asyncio.run(_supervise(args, router_port, choose_ports(WORKER_HOST, num_workers)))
    return 0


async def _supervise(args: argparse.Namespace, router_port: int, worker_ports: list[int]) -> None:
    # Removed while the loop still takes signals: an impatient one cannot leave the folder behind.
    with RunDirectory() as run_dir:
        specs = plan_roles(args, own_executable(), run_dir.path, router_port, worker_ports)
        clock = MonotonicClock()
        supervisor = Supervisor(
            [RoleProcess(spec, run_dir.clean_role, _say, clock) for spec in specs],
            announce=lambda: print(f"ready grpc={_host_port(args.host, router_port)}", flush=True),
            say=_say,
            start_timeout_s=args.start_timeout,
            drain_timeout_s=args.drain_timeout,
        )
        await supervisor.run()


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(line: str) -> None:
    print(f"up | {line}", file=sys.stderr, flush=True)
