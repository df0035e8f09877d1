"""What the C library's allocator makes of a list of requests: the memory that a process holds for its tensors, holes included.

A process on a CPU holds more than its tensors, by a third and more. glibc keeps most blocks in one heap that shrinks at its end
alone, and asks for a little more than an aligned block's size to place it, so that a hole with something small on either side
is not filled by the next block of the same size (seen with glibc 2.36: without the small blocks the heap hardly grows). What
it costs follows from the order of requests, so it is not estimated but tried: the same requests in the same order, each with
a few of the small blocks that torch makes beside a tensor, in a process of its own. The memory is never touched, so that trying
100 GiB costs address space and no memory.
"""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys

_ALIGNMENT = 64  # torch's, of every tensor on a CPU
_MAPPED = 2  # the bit of a chunk's size by which glibc marks what stands outside the heap
_BESIDE = 4  # small blocks made beside a tensor; ten give the same result, none a third less
_LINGER = 50  # how many of them outlive their tensor

Request = tuple[int, int]
"""A block's number and its bytes; below 0: it is given back."""


def taken(requests: list[Request]) -> list[int] | None:
    """Bytes that the allocator holds of the system's memory after each request; None where this cannot be tried."""
    if sys.platform != "linux":
        return None
    # -I and a file without imports of ours: a fresh, small heap, ready in a moment
    command = [sys.executable, "-I", __file__]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def _try(requests: list[Request], library: ctypes.CDLL) -> list[int]:
    held: dict[int, tuple[ctypes.c_void_p, list[int]]] = {}
    lingering: list[int] = []
    rng = random.Random(0)
    mapped, start = 0, library.sbrk(0)
    result = []
    for number, n in requests:
        if n > 0:
            block = ctypes.c_void_p()
            if library.posix_memalign(ctypes.byref(block), _ALIGNMENT, n):
                raise MemoryError
            held[number] = block, [library.malloc(rng.randint(24, 88)) for _ in range(_BESIDE)]
            mapped += _mapped(block)
        elif number in held:
            block, beside = held.pop(number)
            mapped -= _mapped(block)
            library.free(block)
            lingering += beside
            for small in lingering[:-_LINGER]:
                library.free(small)
            lingering = lingering[-_LINGER:]
        result.append(library.sbrk(0) - start + mapped)
    return result


def _mapped(block: ctypes.c_void_p) -> int:
    """Bytes of a block that has a mapping of its own; 0 where it stands in the heap."""
    assert block.value is not None
    size = ctypes.c_size_t.from_address(block.value - ctypes.sizeof(ctypes.c_size_t)).value
    return size & ~7 if size & _MAPPED else 0


def _glibc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    _ = library.gnu_get_libc_version  # AttributeError: another C library
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    return library


if __name__ == "__main__":
    json.dump(_try(json.load(sys.stdin), _glibc()), sys.stdout)
