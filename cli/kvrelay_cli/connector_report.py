"""Of each connector: whether it works here and how fast, or what is missing and how to get it; what `auto` takes.

Knows the prober's answers, and no torch.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
from msgspec import Struct

from kvrelay_cli.finding import Finding, absent, bad, ok
from kvrelay_cli.flags import CONNECTORS
from kvrelay_cli.transfer.prober import Prober, Speed, TorchFacts
from kvrelay_core.errors import DeadlineError, UnsupportedError, WorkerLostError

Answer = TypeVar("Answer")

GIB = 2**30
GET_TORCH = "pip install 'kvrelay[engine]'"
GET_NIXL = "pip install 'kvrelay[nixl]'"
GET_UCX = "pip install 'kvrelay[ucx]' (with CUDA 12: ucxx-cu12)"

FACTS_TIMEOUT_S = 12.0
MEASURE_TIMEOUT_S = 8.0  # the first on a GPU makes two contexts
WORTH_ASKING_S = 1.0
BUDGET_S = 17.0  # of all that is asked of the prober


class Missing(Struct, frozen=True):
    why: str
    get_it: str = ""

    def __str__(self) -> str:
        return f"missing: {self.why}{'; ' if self.get_it else ''}{self.get_it}"


class ConnectorState(Struct, frozen=True, omit_defaults=True):
    """Exactly one of `speed`, `missing` and `failure`, none of them where nothing was measured."""

    name: str
    in_auto: bool = False
    speed: Speed | None = None
    missing: Missing | None = None
    failure: str = ""
    unknown: str = ""  # why it was not measured
    note: str = ""


def look_at_torch(facts: TorchFacts | None, failure: str, has_driver: bool) -> Iterator[Finding]:
    """`facts` None: there is no torch, or it broke with `failure`."""
    if facts is None:
        yield (
            bad("torch", failure)
            if failure
            else absent("torch", f"not installed: this machine can run a router and clients, no workers; {GET_TORCH}")
        )
        return
    yield ok("torch", f"{facts.version}, {facts.num_threads} threads, CUDA {facts.cuda_version or 'not built in'}")
    for index, gpu in enumerate(facts.gpus):
        peers = f"; reads {', '.join(f'cuda:{peer}' for peer in gpu.peers)} directly" if gpu.peers else ""
        free, total = gpu.free_bytes / GIB, gpu.total_bytes / GIB
        yield ok(f"cuda:{index}", f"{gpu.name}, {free:.1f} of {total:.1f} GiB free{peers}")
    if len(facts.gpus) > 1 and not any(gpu.peers for gpu in facts.gpus):
        yield absent("peer access", "no GPU reads another's memory directly: reads between them go by the host")
    if not facts.gpus and has_driver:
        yield bad("cuda", f"a driver is installed, but torch {facts.version} cannot use it")
    elif not facts.gpus:
        yield absent("cuda", "no NVIDIA driver; --device cpu works")


def missing_part(name: str, facts: TorchFacts | None, is_installed: Callable[[str], bool]) -> Missing | None:
    """What connector `name` lacks here; None when it can be tried."""
    if facts is None:
        if is_installed("torch"):
            return Missing("connectors need torch, and it does not work here")
        return Missing("connectors need torch", GET_TORCH)
    match name:
        case "cuda_ipc" if not facts.gpus:
            return Missing("no GPU that torch can use; it reads pools of GPUs in one host")
        case "nixl" if not is_installed("nixl"):
            hardware = "" if facts.has_rdma else ", and there is no RDMA hardware for it, so auto does without"
            return Missing(f"NIXL is not installed{hardware}", GET_NIXL)
        case "ucx" if not is_installed("ucxx"):
            return Missing("ucxx is not installed; auto does without", GET_UCX)
        case _:
            return None


def auto_note(name: str, facts: TorchFacts) -> str:
    """Why a connector that could be tried is not in `auto`."""
    if any(name in order for order in facts.auto.values()):
        return ""
    if name == "nixl" and not facts.has_rdma:
        return (
            "not in auto: no RDMA hardware (nothing in /sys/class/infiniband); --connector nixl takes it all the same"
        )
    return f"not in auto; --connector {name} takes it"


class ConnectorSurvey:
    """Asks a prober, within a budget of time; a prober that dies is replaced for the next connector."""

    def __init__(self, make_prober: Callable[[], Prober] = Prober, budget_s: float = BUDGET_S) -> None:
        self._make_prober = make_prober
        self._give_up_s = time.monotonic() + budget_s
        self._prober: Prober | None = None

    def facts(self) -> TorchFacts:
        """Raises DeadlineError or WorkerLostError when torch cannot be looked at."""
        return self._asked(lambda prober: prober.facts(self._within(FACTS_TIMEOUT_S)))

    def state_of(
        self, name: str, facts: TorchFacts | None, is_installed: Callable[[str], bool], *, measure: bool
    ) -> ConnectorState:
        missing = missing_part(name, facts, is_installed)
        if missing is not None or facts is None:
            return ConnectorState(name, missing=missing)
        note = auto_note(name, facts)
        state = ConnectorState(name, in_auto=not note, note=note)
        if not measure:
            return msgspec.structs.replace(state, unknown="not measured")
        device = "cuda" if facts.gpus and name != "shm" else "cpu"
        try:
            speed = self._asked(lambda prober: prober.measure(name, device, self._within(MEASURE_TIMEOUT_S)))
            return msgspec.structs.replace(state, speed=speed)
        except DeadlineError as error:
            unknown = f"not measured: {error.message}; try kvrelay bench transfer --connector {name}"
            return msgspec.structs.replace(state, unknown=unknown)
        except (UnsupportedError, WorkerLostError) as error:
            return msgspec.structs.replace(state, failure=error.message)

    def close(self) -> None:
        if self._prober is not None:
            self._prober.close()
            self._prober = None

    def _asked(self, ask: Callable[[Prober], Answer]) -> Answer:
        if time.monotonic() + WORTH_ASKING_S > self._give_up_s:
            raise DeadlineError("the time for measurements was up")
        if self._prober is None:
            self._prober = self._make_prober()
        try:
            return ask(self._prober)
        except (DeadlineError, WorkerLostError):
            self.close()
            raise

    def _within(self, timeout_s: float) -> float:
        return min(timeout_s, self._give_up_s - time.monotonic())


def finding_of(state: ConnectorState) -> Finding:
    name, note = f"  {state.name}", f"; {state.note}" if state.note else ""
    if state.missing is not None:
        return absent(name, str(state.missing))
    if state.failure:
        return (bad if state.in_auto else absent)(name, f"does not work: {state.failure}{note}")
    if state.speed is None:
        return absent(name, f"{state.unknown}{note}")
    speed = state.speed
    plain = "memcpy" if speed.device == "cpu" else "raw copy"
    return ok(
        name,
        f"works: {speed.gb_per_s:.2f} GB/s on {speed.device} ({plain} {speed.plain_gb_per_s:.2f}, first touch "
        f"{speed.first_gb_per_s:.2f}), one block {1e3 * speed.one_block_s:.2f} ms{note}",
    )


def auto_findings(facts: TorchFacts) -> Iterator[Finding]:
    for device, order in facts.auto.items():
        yield ok("auto", f"--device {device}: {', then '.join(order)}: the first that reaches the peer")


def connector_names() -> tuple[str, ...]:
    return tuple(name for name in CONNECTORS if name != "auto")


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def has_driver() -> bool:
    return shutil.which("nvidia-smi") is not None
