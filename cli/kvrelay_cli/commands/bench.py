"""`kvrelay bench NAME`: runs a benchmark of a source checkout; the same as `scripts/bench NAME`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvrelay_core.errors import ConfigError

EPILOG = """\
examples:
  kvrelay bench relay                 the relay against transformers on the same weights
  kvrelay bench relay --help          what else it can be told
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="which one: a file of the checkout's bench/ folder, such as relay")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its own flags")


def run(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[3] / "bench"
    known = sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise ConfigError("benchmarks are not part of the installed package; run this from a source checkout")
    if args.name not in known:
        raise ConfigError(f"no benchmark {args.name!r}; there is {', '.join(known)}")
    command = [sys.executable, str(folder / f"{args.name}.py"), *args.words]
    return subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False).returncode
