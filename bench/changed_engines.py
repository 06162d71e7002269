"""`kvrelay` whose engines are the product's with something changed, for measurements that need it.

    changed_engines.py CHANGE up ...            as `kvrelay up`; starts the roles by this program
    changed_engines.py CHANGE serve ROLE ...    as `kvrelay serve`; starts the engine by this program
    changed_engines.py CHANGE --config FILE     the engine

CHANGE is a module beside this file; its `change(config)` is called in each engine's process before anything is loaded.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve()


def main() -> int:
    change, *words = sys.argv[1:]
    command = (sys.executable, str(PROGRAM), change)
    return run_engine(change, words) if words[0] == "--config" else run_kvrelay(words, command)


def run_engine(change: str, words: list[str]) -> int:
    from kvrelay_engine import process
    from kvrelay_engine.config import load_config

    sys.path[:0] = [str(PROGRAM.parent)]
    importlib.import_module(change).change(load_config(words[1]))
    return process.main(words)


def run_kvrelay(words: list[str], command: tuple[str, ...]) -> int:
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # as `kvrelay serve` has it
    from kvrelay_cli.main import main as kvrelay

    patched: Any
    if words[0] == "serve":
        from kvrelay_worker import server
        from kvrelay_worker.engine_client import EngineClient

        patched = server
        patched.EngineClient = partial(EngineClient, command=command)
    else:
        from kvrelay_cli.commands import up

        patched = up
        patched.own_executable = lambda: command
    return kvrelay(words)


if __name__ == "__main__":
    sys.exit(main())
