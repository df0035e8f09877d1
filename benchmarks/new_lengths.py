"""Memory that stays after products of ever new numbers of rows, as micro-batches of varied length ask for them.

    python benchmarks/new_lengths.py                       with the caches as preftune sets them
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 LRU_CACHE_CAPACITY=1024 python benchmarks/new_lengths.py       as torch has them

Forward and backward products of an MLP, a projection and a tile of the head (width 512), one thread; glibc 2.33 or later.
"""

from __future__ import annotations

import ctypes
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import torch  # noqa: E402

from preftune.engine.linear import product_t  # noqa: E402

SHAPES = ((512, 512), (1408, 512), (512, 1408), (4096, 512))


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [
        (field, ctypes.c_size_t)
        for field in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keep")
    ]


def in_use() -> float:
    """MiB that are allocated and not freed."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = Heap
    heap = mallinfo()
    return float(heap.used + heap.hblkhd) / 2**20


def main() -> None:
    """Fifty numbers of rows, 600 products."""
    weights = [torch.randn(shape) for shape in SHAPES]
    before, start = in_use(), time.process_time()
    for n, rows in enumerate(range(300, 500, 4), 1):
        for weight in weights:
            x = torch.randn(rows, weight.shape[1])
            y = product_t(x, weight)
            product_t(y, weight.T)
            product_t(y.T, x.T)
        del x, y
        if n % 10 == 0:
            print(f"{n} numbers of rows: {in_use() - before:.0f} MiB stay, {time.process_time() - start:.1f} CPU seconds")


if __name__ == "__main__":
    main()
