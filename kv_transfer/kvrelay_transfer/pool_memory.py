"""Where the KV of one rank, or the embeddings of a worker, lie: the pool tensor and its fence words.

CPU: both in one sealed memfd that peers map read-only. CUDA: the tensor is a plain cudaMalloc of its own, the words
lie in a memfd. Knows which bytes are which block, not who owns them (`kvrelay_engine.block_pool`).
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.cuda_memory import allocate_tensor
from kvrelay_transfer.embedding_layout import PoolLayout
from kvrelay_transfer.fence import FenceWords
from kvrelay_transfer.memfd import create_memfd, seal
from kvrelay_transfer.region import RegionHeader
from kvrelay_transfer.slice_copy import BlockBytes

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}


class PoolMemory:
    """`tensor` [num_blocks, *layout.shape], zeroed; `words` its fence words."""

    def __init__(
        self, layout: PoolLayout, header: RegionHeader, mapping: mmap.mmap, fd: int, tensor: torch.Tensor
    ) -> None:
        """Use `allocate`."""
        self.layout = layout
        self.num_blocks = header.num_blocks
        self.engine_epoch = header.engine_epoch
        self.device = tensor.device.type
        self.tensor = tensor
        self.words = FenceWords(
            np.frombuffer(mapping, np.uint64, header.num_blocks, header.words_offset), header.engine_epoch
        )
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)  # a descriptor is no more than a number

    @classmethod
    def allocate(
        cls, layout: PoolLayout, num_blocks: int, device: str, epoch: bytes, *, sized_by: str = "--kv-blocks"
    ) -> PoolMemory:
        """`num_blocks` counts the null block; `epoch` is the engine's, 16 bytes; `sized_by` the flag to change.

        Raises ConfigError when memory is short.
        """
        layout.validate()
        if num_blocks < 2:
            raise ConfigError(f"a pool needs at least 2 blocks; raise {sized_by}")
        on_cpu = torch.device(device).type == "cpu"
        header = RegionHeader.plan(layout, num_blocks, epoch, has_data=on_cpu)
        fd = create_memfd("kvrelay-pool", header.size_bytes, f"lower {sized_by} (now {num_blocks} blocks)")
        try:
            mapping = mmap.mmap(fd, header.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            seal(fd, future_writes=False)
            tensor = _cpu_tensor(layout, header, mapping) if on_cpu else _cuda_tensor(layout, num_blocks, device)
        except BaseException:
            os.close(fd)
            raise
        memory = cls(layout, header, mapping, fd, tensor)
        mapping[: len(header.pack())] = header.pack()
        return memory

    @property
    def fd(self) -> int:
        """The segment's descriptor, for peers on this host."""
        return self._fd

    @property
    def block_rows(self) -> torch.Tensor:
        """The pool as bytes [num_blocks, block_bytes]: whole blocks of any dtype."""
        return self.tensor.view(torch.uint8).view(self.num_blocks, self.layout.block_bytes)

    @property
    def host_blocks(self) -> BlockBytes:
        """The same for numpy; of a pool on CPU."""
        return BlockBytes(self.block_rows.numpy().reshape(-1), self.layout.block_bytes)

    @property
    def data_address(self) -> int:
        """Of block 0."""
        return self.tensor.data_ptr()

    def close(self) -> None:
        """Gives the descriptor back; the memory goes with the last tensor and the last peer that hold it. On a GPU
        ours is no longer one of them: who restarts there needs the room at once."""
        self._close_fd()
        self._fd = -1
        if self.device == "cuda":
            self.tensor = self.tensor.new_empty(0)


def _cpu_tensor(layout: PoolLayout, header: RegionHeader, mapping: mmap.mmap) -> torch.Tensor:
    data_bytes = header.num_blocks * header.block_bytes
    flat = torch.frombuffer(mapping, dtype=torch.uint8, count=data_bytes, offset=header.data_offset)
    return flat.view(TORCH_DTYPES[layout.dtype]).view(header.num_blocks, *layout.shape)


def _cuda_tensor(layout: PoolLayout, num_blocks: int, device: str) -> torch.Tensor:
    size_bytes = num_blocks * layout.block_bytes
    flat = allocate_tensor(size_bytes, torch.device(device), f"lower --kv-blocks (now {num_blocks})")
    return flat.view(TORCH_DTYPES[layout.dtype]).view(num_blocks, *layout.shape)
