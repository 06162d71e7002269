"""Writing new keys and values into the paged pool."""

from kvrelay_kernels.kv_cache.op import write_kv

__all__ = ["write_kv"]
