"""What glibc's malloc would hold at a step's peak, live tensors and the holes between them: asked of malloc itself.

A step leaves small objects (autograd's nodes, shapes) between the blocks of its tensors, and a hole that has lost a
few bytes to one no longer takes the next layer's tensor. With checkpointing in fp32, where a layer's tensors are below
the 32 MiB from which malloc maps each on its own, an eighth to a fifth of a step's memory is such holes (three
models, 2 x 512 tokens, Zen 3). No formula gives it, so a planned step takes the addresses of its fake tensors from
malloc and never writes to them: the system gives no memory to addresses that are not written (but for malloc's own
words beside each, for which transparent huge pages, where they are on, would give 2 MiB at a time: they are off here).
"""

from __future__ import annotations

import ctypes
import sys
import weakref

import torch

from .live_bytes import LiveBytes

THP_DISABLE = 41  # of prctl(2)
ALIGNMENT = 64  # of torch's tensors on a CPU
NOTICED = 65536  # bytes from which a tensor may move the peak
FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Info(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


class HeldBytes(LiveBytes):
    """Live bytes, and what malloc takes from the system for them.

    Use it only where `malloc_counts()`, in a process whose heap has no holes yet and where no other thread allocates.

    Attributes:
        most: bytes that malloc has had from the system at once since the block began.
    """

    def __init__(self) -> None:
        super().__init__()
        self._libc = _libc()
        self._libc.prctl(THP_DISABLE, 1, 0, 0, 0)
        self._libc.malloc_trim(0)
        self._before = _held(self._libc)
        self.most, self._refused = 0, False

    @property
    def held(self) -> int | None:
        """Bytes beyond the peak; None where malloc refused addresses, or is another than the one that was asked."""
        return None if self._refused or self.most < self.peak else self.most - self.peak

    def _count(self, storage: torch.UntypedStorage) -> bool:
        counted = super()._count(storage)
        if counted:
            address = ctypes.c_void_p()
            size = max(1, storage.nbytes())
            self._refused |= self._libc.posix_memalign(ctypes.byref(address), ALIGNMENT, size) != 0
            weakref.finalize(storage, self._libc.free, address)
            if size >= NOTICED:
                self.most = max(self.most, _held(self._libc) - self._before)
        return counted


def malloc_counts() -> bool:
    """True where malloc can be asked: glibc's, since 2.33."""
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _held(libc: ctypes.CDLL) -> int:
    info = libc.mallinfo2()
    return int(info.arena + info.hblkhd)
