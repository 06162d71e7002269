"""The environment in which an engine process on a CPU reads its weights at full speed.

A decode step reads every weight once, and over pages of 4 KiB it spends a tenth of its time on looking addresses up.
torch asks the kernel for huge pages where it is told to at its import, hence the environment. Measured on a model of
100 M parameters, one thread: steps of 1, 2 and 8 sequences 1.13, 1.22 and 1.11 times as fast, prefill 1.04 times.
"""

from __future__ import annotations

from collections.abc import Mapping

_SWITCH = "THP_MEM_ALLOC_ENABLE"


def huge_page_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a child that runs an engine; what the user set stays. Without huge pages nothing changes."""
    return {_SWITCH: "1", **environment}
