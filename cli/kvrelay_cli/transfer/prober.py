"""A process that looks at torch and the devices and tries connectors, so that nothing of theirs can take `doctor` down.

The parent's side imports no torch.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from kvrelay_cli.transfer.line_process import LineChild, LineProcess
from kvrelay_core.errors import KvRelayError, UnsupportedError

MODULE = "kvrelay_cli.transfer.prober"
SPAN_BYTES, SIZE_BYTES = 2 << 20, 16 << 20
REPEATS = 3


class Gpu(Struct, frozen=True):
    name: str
    free_bytes: int
    total_bytes: int
    peers: tuple[int, ...]  # GPUs whose memory it reads directly


class TorchFacts(Struct, frozen=True):
    """`auto` is what `--connector auto` stands for on each device."""

    version: str
    num_threads: int
    cuda_version: str | None  # that torch was built with
    gpus: tuple[Gpu, ...]
    has_rdma: bool
    auto: dict[str, tuple[str, ...]]


class Speed(Struct, frozen=True):
    """In GB/s (10^9 bytes a second); `first` touches every page of a new pool, `plain` is a memcpy or a GPU's copy."""

    device: str
    first_gb_per_s: float
    gb_per_s: float
    plain_gb_per_s: float
    one_block_s: float


class Prober:
    """The parent's handle. Every method raises DeadlineError or WorkerLostError when the process is gone."""

    def __init__(self) -> None:
        self._process = LineProcess(MODULE)

    def facts(self, timeout_s: float) -> TorchFacts:
        return msgspec.convert(self._process.ask(["facts"], timeout_s), TorchFacts)

    def measure(self, name: str, device: str, timeout_s: float) -> Speed:
        """Raises UnsupportedError with the connector's own words when it does not work here."""
        told = self._process.ask(["measure", name, device], timeout_s)
        if "error" in told:
            raise UnsupportedError(told["error"])
        return msgspec.convert(told, Speed)

    def close(self) -> None:
        self._process.close()


def look_at_torch() -> TorchFacts:
    import torch

    from kvrelay_transfer.connectors.nixl import has_rdma
    from kvrelay_transfer.connectors.registry import preferred

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for index in range(count):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        peers = [other for other in range(count) if other != index and torch.cuda.can_device_access_peer(index, other)]
        gpus.append(Gpu(torch.cuda.get_device_name(index), free_bytes, total_bytes, tuple(peers)))
    auto = {device: preferred(device) for device in ("cpu", "cuda")[: 1 + bool(count)]}
    cuda_version = torch.version.cuda
    return TorchFacts(
        str(torch.__version__), torch.get_num_threads(), cuda_version, tuple(gpus), has_rdma(), auto
    )  # fmt: skip


class Measurements:
    """In the process: one source for each device, made when it is first needed."""

    def __init__(self) -> None:
        self._sources: dict[str, Any] = {}

    def measure(self, name: str, device: str) -> Speed:
        from kvrelay_cli.transfer.measure import devices_for, measure_spans
        from kvrelay_cli.transfer.source import Source

        devices = devices_for(device)
        source = self._sources.get(devices.source)
        if source is None:
            source = self._sources[devices.source] = Source(devices.source)
        try:
            [row] = measure_spans(name, source, devices, (SPAN_BYTES,), SIZE_BYTES, REPEATS)
        except KvRelayError:  # the source may be gone, or half way through: the next connector gets a new one
            self._sources.pop(devices.source).close()
            raise
        return Speed(device, row.first_gb_per_s, row.gb_per_s, row.plain_gb_per_s, row.one_span_s)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def main() -> None:
    child = LineChild()
    measurements = Measurements()
    try:
        for question in child.questions():
            match question:
                case ["facts"]:
                    child.answer(msgspec.to_builtins(look_at_torch()))
                case ["measure", name, device]:
                    try:
                        child.answer(msgspec.to_builtins(measurements.measure(name, device)))
                    except KvRelayError as error:
                        child.answer({"error": str(error)})
    finally:
        measurements.close()


if __name__ == "__main__":
    main()
