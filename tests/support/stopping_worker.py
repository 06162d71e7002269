"""`kvrelay serve prefill|decode ...` whose engine is a `stopping_engine`; all else is as it ships."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from kvrelay_cli.main import main
from kvrelay_worker import server
from kvrelay_worker.engine_client import EngineClient

if __name__ == "__main__":
    engine = str(Path(__file__).with_name("stopping_engine.py"))
    patched: Any = server
    patched.EngineClient = partial(EngineClient, command=(sys.executable, "-P", engine))
    sys.exit(main(["serve", *sys.argv[1:]]))
