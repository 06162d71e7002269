"""What one stream of tokens looked like to its receiver, and where a result came from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

ROOT = Path(__file__).resolve().parent.parent


class Stream(Struct, frozen=True):
    """Arrival of each token in seconds after the request was sent."""

    arrivals_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0]

    @property
    def inter_token_s(self) -> float:
        """Mean over the tokens after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (len(self.arrivals_s) - 1)


class Streams(Struct, frozen=True):
    """Streams that ran together, or one after another, in `wall_s`."""

    streams: tuple[Stream, ...]
    wall_s: float

    @property
    def ttft_ms(self) -> float:
        return 1e3 * statistics.median(stream.ttft_s for stream in self.streams)

    @property
    def inter_token_ms(self) -> float:
        return 1e3 * statistics.median(stream.inter_token_s for stream in self.streams)

    @property
    def tokens_per_s(self) -> float:
        return sum(len(stream.arrivals_s) for stream in self.streams) / self.wall_s

    def as_row(self) -> dict[str, float]:
        return {
            "ttft_ms": round(self.ttft_ms, 2),
            "inter_token_ms": round(self.inter_token_ms, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


def provenance() -> dict[str, str]:
    """Which machine and which commit; `-dirty` when the working tree differs from it.

    KVRELAY_COMMIT names the commit of a tree that was exported without its repository.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = os.environ.get("KVRELAY_COMMIT", "")
    if not commit:
        commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
        commit += "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "commit": commit,
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


class OthersCpu:
    """How much of this machine's CPU processes that are not ours used since this was made: a measurement beside which
    others computed is worth little. Processes of ours count once they have ended."""

    def __init__(self) -> None:
        self._started_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """On average."""
        others_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(0.0, others_s / (time.monotonic() - self._started_s))


def _busy_s() -> float:
    """Of all CPUs together: everything but idle and waiting for disks."""
    user, nice, system, _idle, _wait, irq, soft_irq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def write_result(name: str, result: dict[str, Any]) -> Path:
    source = result["provenance"]
    name_of_machine = source.get("gpus") or source["cpu"]
    machine = "".join(letter if letter.isalnum() else "-" for letter in name_of_machine).strip("-").lower()[:40]
    path = ROOT / "bench" / "results" / f"{name}-{machine}-{source['commit']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown, so that it can go into the README as it is."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
