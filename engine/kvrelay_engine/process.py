"""The engine process: `python -m kvrelay_engine.process --config FILE`, started by a worker's service.

Start: die with the parent, connect to the service, load everything, say Started or StartFailed. Then the loop
(`loop.py`), in the main thread, until Shutdown or until the service is gone. Signals that a terminal or a
supervisor sends to the whole group are the service's business: it drains, then says Shutdown.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import ConfigError, InternalError, KvRelayError, WorkerLostError
from kvrelay_core.parent_death import parent_death_tie
from kvrelay_engine.config import EngineConfig, load_config
from kvrelay_engine.messages import Started, StartFailed
from kvrelay_engine.pulse import PulseThread
from kvrelay_engine.service_link import ServiceLink

logger = logging.getLogger(__name__)

# Without it a copy thread may keep the step loop from the interpreter for 5 ms at a time.
SWITCH_INTERVAL_S = 1e-4


def main(arguments: list[str] | None = None) -> int:
    parent_pid = os.getppid()
    parser = argparse.ArgumentParser(prog="kvrelay_engine.process", description="One KVRelay engine.")
    parser.add_argument("--config", required=True, metavar="FILE", help="EngineConfig as JSON, or a file with it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        parent_death_tie(parent_pid)()
        config = load_config(options.config)
    except (ConfigError, WorkerLostError) as error:
        logger.error("%s", error)
        return 2
    with ServiceLink(config.commands_endpoint, config.events_endpoint) as link, ExitStack() as stack:
        return _serve(config, link, stack)


def _build(config: EngineConfig, link: ServiceLink, stack: ExitStack) -> tuple[Started, Callable[[], None]]:
    """What the engine says of itself, and its loop."""
    clock = MonotonicClock()
    # Imports torch; only now, so that wrong flags are told at once.
    if config.role == "encoder":
        from kvrelay_engine.encoder.loop import EncoderLoop
        from kvrelay_engine.encoder.startup import build_encoder

        pulse = PulseThread(link.open_pulse, clock)
        stack.callback(pulse.close)
        encoder = build_encoder(config, clock, link.emit, stack, pulse.computing)
        return encoder.started, EncoderLoop(encoder.engine, link, clock).run
    from kvrelay_engine.loop import EngineLoop
    from kvrelay_engine.startup import build_engine

    built = build_engine(config, clock, link.emit, stack)
    return built.started, EngineLoop(built.engine, link, clock).run


def _serve(config: EngineConfig, link: ServiceLink, stack: ExitStack) -> int:
    try:
        started, run = _build(config, link, stack)
    except KvRelayError as error:
        logger.error("the engine did not start: %s", error)
        link.emit(StartFailed(info_of(error)))
        return 1
    except Exception as error:
        logger.exception("the engine did not start")
        link.emit(StartFailed(info_of(InternalError(f"the engine did not start: {error!r}"))))
        return 1
    gc.collect()
    gc.freeze()  # the model's modules are no garbage: do not look at them again
    link.emit(started)
    try:
        run()
    except WorkerLostError as error:
        logger.warning("%s; the engine exits", error)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
