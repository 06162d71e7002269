"""The list of all ops."""

from __future__ import annotations

import kvrelay_kernels.activation.spec
import kvrelay_kernels.attention.spec
import kvrelay_kernels.kv_cache.spec
import kvrelay_kernels.kv_copy.spec
import kvrelay_kernels.norm.spec
import kvrelay_kernels.rope.spec
import kvrelay_kernels.sampling.spec
from kvrelay_kernels.spec import OpSpec


def all_specs() -> dict[str, OpSpec]:
    """Every op's spec by name."""
    specs = (
        *kvrelay_kernels.norm.spec.SPECS,
        *kvrelay_kernels.rope.spec.SPECS,
        *kvrelay_kernels.activation.spec.SPECS,
        *kvrelay_kernels.kv_cache.spec.SPECS,
        *kvrelay_kernels.attention.spec.SPECS,
        *kvrelay_kernels.kv_copy.spec.SPECS,
        *kvrelay_kernels.sampling.spec.SPECS,
    )
    return {spec.name: spec for spec in specs}
