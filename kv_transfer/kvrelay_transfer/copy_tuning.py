"""The environment in which an engine process copies large spans at full speed.

glibc's memmove writes around the caches only from three quarters of the L3 cache on (192 MiB on some
processors); below that each written line is first read from memory. KV spans are a few MiB and not read again
soon, so the threshold belongs at 1 MiB: hand-offs over shared memory then ran at 11 instead of 6.8 GB/s, measured
with one prefill and two decode workers on a processor with 32 MiB of L3. glibc reads the setting at the start of a
process, hence the environment.
"""

from __future__ import annotations

from collections.abc import Mapping

_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"
_THRESHOLD_BYTES = 1 << 20


def copy_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a child that runs an engine; what the user set stays. Other C libraries ignore it."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables:
        return dict(environment)
    setting = f"{_TUNABLE}={_THRESHOLD_BYTES}"
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{setting}" if tunables else setting}
