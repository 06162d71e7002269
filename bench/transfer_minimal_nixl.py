"""The least program that moves scattered spans with NIXL: what the connector is measured against.

    seconds = minimal_nixl(span_sizes, size_bytes, source_device, reader_device, repeats)

One other process that owns plain memory; no pool, no words, no deadlines, no errors.
"""

from __future__ import annotations

import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvrelay_core.errors import ConfigError

_READY = "ready:"


def minimal_nixl(
    span_sizes: Sequence[int], size_bytes: int, source_device: str, reader_device: str, repeats: int
) -> dict[int, float]:
    """By span size, the median of the seconds of one READ of half of the source's spans into ours, prepared lists on
    both sides."""
    source = subprocess.Popen(
        [sys.executable, __file__, source_device, str(2 * size_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert source.stdin is not None and source.stdout is not None
    try:
        # The library may say something of its own before.
        line = next((line for line in source.stdout if line.startswith(_READY)), None)
        if line is None:
            raise ConfigError("nixl is not installed, or finds no transport")
        name, address, metadata = line.removeprefix(_READY).split()
        agent, memory = _make_agent(reader_device, size_bytes, fill=0)
        agent.add_remote_agent(bytes.fromhex(metadata))
        medians_s = {}
        for span_bytes in span_sizes:
            num_spans = size_bytes // span_bytes
            ours = _spans(memory.data_ptr(), num_spans, span_bytes, reader_device)
            theirs = _spans(int(address), 2 * num_spans, span_bytes, source_device)
            lists = (agent.prep_xfer_dlist("NIXL_INIT_AGENT", *ours), agent.prep_xfer_dlist(name, *theirs))
            memory.zero_()
            if memory.is_cuda:
                torch.cuda.synchronize(memory.device)
            medians_s[span_bytes] = statistics.median(_read_times_s(agent, lists, num_spans, repeats)[1:])
            assert bool((memory[: num_spans * span_bytes] == 1).all()), "other bytes came than were sent"
        return medians_s
    finally:
        source.stdin.close()
        source.wait(30)
        source.stdout.close()


def _read_times_s(agent: Any, lists: tuple[Any, Any], num_spans: int, repeats: int) -> list[float]:
    """`lists` are ours and theirs, of twice as many spans."""
    generator = random.Random(num_spans)
    local = np.array(generator.sample(range(num_spans), num_spans), np.int32)
    remote = np.array(generator.sample(range(2 * num_spans), num_spans), np.int32)
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        handle = agent.make_prepped_xfer("READ", lists[0], local, lists[1], remote)
        state = agent.transfer(handle)
        while state == "PROC":
            os.sched_yield()
            state = agent.check_xfer_state(handle)
        times_s.append(time.perf_counter() - started_s)
        agent.release_xfer_handle(handle)
        assert state == "DONE", state
    return times_s


def _make_agent(device: str, size_bytes: int, fill: int) -> tuple[Any, torch.Tensor]:
    """An agent as the connector has it, and bytes that it has registered."""
    try:
        from nixl import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ConfigError(f"nixl is not installed: {error}") from error
    memory = torch.full((size_bytes,), fill, dtype=torch.uint8, device=device)
    agent = nixl_agent(f"minimal-{os.getpid()}", nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    kind, index = _kind(device)
    agent.register_memory([(memory.data_ptr(), size_bytes, index, "")], kind)
    return agent, memory


def _spans(address: int, num_spans: int, span_bytes: int, device: str) -> tuple[Any, str]:
    kind, index = _kind(device)
    spans = np.empty((num_spans, 3), np.uint64)
    spans[:, 0] = address + np.arange(num_spans, dtype=np.uint64) * np.uint64(span_bytes)
    spans[:, 1:] = span_bytes, index
    return spans, kind


def _kind(device: str) -> tuple[str, int]:
    found = torch.device(device)
    return ("DRAM", 0) if found.type == "cpu" else ("VRAM", found.index or 0)


def _own(device: str, size_bytes: int) -> None:
    """The source: makes progress until its stdin ends."""
    agent, memory = _make_agent(device, size_bytes, fill=1)
    print(_READY, agent.name, memory.data_ptr(), agent.get_agent_metadata().hex(), flush=True)
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        agent.get_new_notifs()


if __name__ == "__main__":
    _own(sys.argv[1], int(sys.argv[2]))
