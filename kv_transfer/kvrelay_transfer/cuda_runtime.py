"""The calls of the CUDA runtime that torch does not offer: plain allocations, IPC handles, batched copies.

Through ctypes, in the very library that torch has loaded, so that both see the same contexts and streams. ctypes gives
the GIL back for each call. Knows addresses, no blocks and no peers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p

import numpy as np
import numpy.typing as npt
import torch

from kvrelay_core.errors import ConfigError

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
IPC_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 0x01  # cudaIpcMemLazyEnablePeerAccess, the only flag there is
_COPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses tell what they are
_SOURCE_ACCESS_IN_STREAM_ORDER = 0x1  # cudaMemcpySrcAccessOrderStream
_PREFER_OVERLAP_WITH_COMPUTE = 0x1  # cudaMemcpyFlagPreferOverlapWithCompute
_BUS_ID_BYTES = 32

Addresses = npt.NDArray[np.uint64]


class CudaCallError(Exception):
    """A call of the runtime failed; `code` is its cudaError_t. Callers translate it into an error of the one tree."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"{function}: {text} ({code})")
        self.code = code


class _IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("reserved", c_char * IPC_HANDLE_BYTES),)


class _MemLocation(ctypes.Structure):
    """cudaMemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class _MemcpyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("source_access_order", c_int),
        ("source_hint", _MemLocation),
        ("destination_hint", _MemLocation),
        ("flags", c_uint),
    )


# As in cuda_runtime_api.h of CUDA 12.8 and 13.0, which agree on these.
_ARGUMENTS: dict[str, Sequence[type]] = {
    "cudaGetLastError": (),
    "cudaRuntimeGetVersion": (POINTER(c_int),),
    "cudaSetDevice": (c_int,),
    "cudaMalloc": (POINTER(c_void_p), c_size_t),
    "cudaFree": (c_void_p,),
    "cudaIpcGetMemHandle": (POINTER(_IpcHandle), c_void_p),
    "cudaIpcOpenMemHandle": (POINTER(c_void_p), _IpcHandle, c_uint),
    "cudaIpcCloseMemHandle": (c_void_p,),
    "cudaDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cudaDeviceGetByPCIBusId": (POINTER(c_int), c_char_p),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
}
_BATCH_ARGUMENTS = (c_void_p, c_void_p, c_void_p, c_size_t, POINTER(_MemcpyAttributes), POINTER(c_size_t), c_size_t)


class CudaRuntime:
    """Every method may raise CudaCallError. Device numbers are torch's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Use `load`."""
        self._library = library
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.cudaGetErrorString.argtypes = (c_int,)
        library.cudaGetErrorString.restype = c_char_p
        version = c_int()
        self._call("cudaRuntimeGetVersion", byref(version))
        self._declare_batch(version.value)

    @classmethod
    def load(cls) -> CudaRuntime:
        """The library that torch uses. Raises ConfigError without CUDA."""
        if torch.version.cuda is None or not torch.cuda.is_available():
            raise ConfigError("this torch has no CUDA, or there is no NVIDIA GPU; use --device cpu")
        torch.cuda.init()  # type: ignore[no-untyped-call]
        name = f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
        try:
            # A library of this name that is loaded already is found before any search.
            return cls(ctypes.CDLL(name))
        except OSError as error:
            raise ConfigError(f"{name}, the CUDA runtime that torch is built for, cannot be loaded: {error}") from error

    def _declare_batch(self, version: int) -> None:
        """cudaMemcpyBatchAsync came with CUDA 12.8; CUDA 13 dropped its pointer to the index of a copy that failed."""
        self.can_batch = version >= 12080
        if not self.can_batch:
            return
        self._fail_index = (POINTER(c_size_t)(),) if version < 13000 else ()
        self._library.cudaMemcpyBatchAsync.argtypes = (
            *_BATCH_ARGUMENTS,
            *(POINTER(c_size_t) for _ in self._fail_index),
            c_void_p,
        )

    # -------------------------------------------------------------------------------------------- memory

    def allocate(self, size_bytes: int, device: int) -> int:
        """Address of new device memory."""
        address = c_void_p()
        with torch.cuda.device(device):
            self._call("cudaMalloc", byref(address), size_bytes)
        assert address.value is not None
        return address.value

    def free(self, address: int, device: int) -> None:
        """Waits for the work of the device."""
        with torch.cuda.device(device):
            self._call("cudaFree", address)

    # ----------------------------------------------------------------------------------------------- IPC

    def export(self, address: int) -> bytes:
        """Handle of an allocation, for `open` in other processes."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", byref(handle), address)
        return bytes(memoryview(handle))

    def open(self, handle: bytes, device: int) -> int:
        """Address at which kernels and copies of *our* `device` reach the exported allocation."""
        address = c_void_p()
        with torch.cuda.device(device):
            exported = _IpcHandle.from_buffer_copy(handle)
            self._call("cudaIpcOpenMemHandle", byref(address), exported, _LAZY_ENABLE_PEER_ACCESS)
        assert address.value is not None
        return address.value

    def close(self, address: int, device: int) -> None:
        """Unmaps what `open` gave. No copy may be under way."""
        with torch.cuda.device(device):
            self._call("cudaIpcCloseMemHandle", address)

    def bus_id(self, device: int) -> str:
        """Such as 0000:18:00.0; the same in every process of the host."""
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaDeviceGetPCIBusId", text, _BUS_ID_BYTES, device)
        return text.value.decode()

    def find_device(self, bus_id: str) -> int | None:
        """None when this process does not see that GPU."""
        device = c_int()
        try:
            self._call("cudaDeviceGetByPCIBusId", byref(device), bus_id.encode())
        except CudaCallError:
            return None
        return device.value

    # ---------------------------------------------------------------------------------------------- copy

    def copy(self, destination: int, source: int, size_bytes: int, stream: torch.cuda.Stream) -> None:
        """Posts one copy."""
        self._call("cudaMemcpyAsync", destination, source, size_bytes, _COPY_DEFAULT, stream.cuda_stream)

    def copy_batch(
        self, destinations: Addresses, sources: Addresses, sizes_bytes: Addresses, stream: torch.cuda.Stream
    ) -> None:
        """Posts a copy for each entry, in no order among themselves. The arrays are free when it returns."""
        attributes = _MemcpyAttributes(_SOURCE_ACCESS_IN_STREAM_ORDER, flags=_PREFER_OVERLAP_WITH_COMPUTE)
        self._call(
            "cudaMemcpyBatchAsync",
            np.ascontiguousarray(destinations).ctypes.data,
            np.ascontiguousarray(sources).ctypes.data,
            np.ascontiguousarray(sizes_bytes).ctypes.data,
            len(destinations),
            byref(attributes),
            byref(c_size_t(0)),
            1,
            *self._fail_index,
            stream.cuda_stream,
        )

    def _call(self, name: str, *arguments: object) -> None:
        code: int = getattr(self._library, name)(*arguments)
        if code != 0:
            # Else the next check of torch's own finds it and blames somebody else.
            self._library.cudaGetLastError()
            raise CudaCallError(name, code, self._library.cudaGetErrorString(code).decode())
