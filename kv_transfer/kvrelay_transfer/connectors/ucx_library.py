"""`ucxx`, imported without the traces that its import leaves: the one place that touches the library's modules.

The import writes UCX_MEMTYPE_CACHE, UCX_RNDV_THRESH and others into the environment, where any other user of UCX in
this process, such as a NIXL agent, would read them (and run at a third of its speed). What we want is given to our
own context instead, one for all workers with the same options; what the user has set in the environment goes before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvrelay_core.errors import ConfigError

# A dead peer is noticed by the reset of its sockets at once, and by this where there is none.
_OPTIONS = {
    "KEEPALIVE_INTERVAL": "300ms",
    "RNDV_THRESH": "8192",  # a chunk is taken when its reader is ready for it, never buffered before
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "256k",
    "TCP_SNDBUF": "4m",
    "TCP_RCVBUF": "4m",
}
# Without its cache of memory types UCX asks the driver about each buffer anew, which waits for the copies under way.
_CUDA_OPTIONS = {"MEMTYPE_CACHE": "y", "RNDV_FRAG_MEM_TYPE": "cuda", "MAX_RNDV_RAILS": "1"}


@dataclass(frozen=True, slots=True)
class UcxLibrary:
    """The classes of `ucxx._lib` that we use; untyped, for ucxx has no annotations."""

    api: Any
    array: Any

    @classmethod
    def load(cls) -> UcxLibrary:
        """Raises ConfigError when ucxx is not installed or cannot be loaded."""
        with _kept_environment():
            try:
                import ucxx  # noqa: F401 - loads the shared libraries
                from ucxx._lib import libucxx
                from ucxx._lib.arr import Array
            except ImportError as error:
                raise ConfigError(f"the ucx connector needs ucxx: pip install 'kvrelay[ucx]' ({error})") from error
        return cls(libucxx, Array)

    def make_worker(self, device: str, options: Mapping[str, str] | None = None) -> Any:
        """A UCX worker, ready to be waited for. `options` as in UCX_*, without the prefix.

        Raises ConfigError when UCX finds nothing to work with.
        """
        wanted = _OPTIONS | (_CUDA_OPTIONS if device != "cpu" else {}) | dict(options or {})
        unset = {name: value for name, value in wanted.items() if f"UCX_{name}" not in os.environ}
        try:
            worker = self.api.UCXWorker(_context(self, tuple(sorted(unset.items()))))
            worker.init_blocking_progress_mode()
        except self.api.UCXError as error:
            raise ConfigError(f"UCX cannot start: {error}; look at UCX_TLS and UCX_NET_DEVICES") from error
        return worker


@cache
def _context(library: UcxLibrary, options: tuple[tuple[str, str], ...]) -> Any:
    """One for the process, with a registration cache: without it UCX 1.21 crashes when a send is given up that its peer
    was to fetch. A context cannot have one that is made after another UCX, such as NIXL's, has hooked into memory
    management behind the first of ours; then peers fetch nothing, which is slower."""
    api = library.api
    features = (api.Feature.TAG, api.Feature.WAKEUP)
    try:
        return api.UCXContext({"RCACHE_ENABLE": "y", **dict(options)}, features)
    except api.UCXError:
        return api.UCXContext({"RNDV_SCHEME": "put_zcopy", **dict(options)}, features)


@contextmanager
def _kept_environment() -> Iterator[None]:
    before = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("UCX_")]:
            del os.environ[name]
        os.environ.update(before)
