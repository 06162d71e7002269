"""`kvrelay bench NAME`: `transfer` measures the connectors here; any other is a benchmark of a source checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvrelay_core.errors import ConfigError

EPILOG = """\
`transfer` is part of the installed package. Others are run from a source checkout, the same as `scripts/bench NAME`.

examples:
  kvrelay bench transfer              how fast each connector moves KV blocks on this machine
  kvrelay bench transfer --help       its flags
  kvrelay bench relay                 the relay against transformers on the same weights
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="transfer, or a file of the checkout's bench/ folder, as relay")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its own flags")


def run(args: argparse.Namespace) -> int:
    if args.name == "transfer":
        from kvrelay_cli import bench_transfer

        return bench_transfer.main(args.words)
    folder = Path(__file__).resolve().parents[3] / "bench"
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise ConfigError("only `transfer` is part of the installed package; run others from a source checkout")
    if args.name not in known:
        raise ConfigError(f"no benchmark {args.name!r}; there is {', '.join(known)}")
    command = [sys.executable, str(folder / f"{args.name}.py"), *args.words]
    return subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode
