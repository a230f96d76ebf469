"""What DeepSpeed's `async_io` extension does, in Python: `zero3_nvme` and `zero3_nvme_optimizer` run, files and all, where there is no libaio to compile it with.

DeepSpeed swaps only what is larger than a megabyte. `install` takes that limit away, so that a test's small tensors go to disk too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


class Handle:
    """`aio_handle` of deepspeed/ops/csrc/aio/py_lib/py_ds_aio.cpp. Everything is done at once; `wait` says how much that was."""

    locked: ClassVar[dict[int, tuple[int, Tensor]]] = {}  # address → (bytes, tensor), of all handles

    def __init__(self, block_size: int, queue_depth: int, single_submit: bool, overlap_events: bool,
                 intra_op_parallelism: int) -> None:  # fmt: skip
        self.pending = 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        Path(path).write_bytes(buffer.detach().view(torch.uint8).numpy().tobytes())
        self.pending += 1
        return 0

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
        buffer.detach().view(torch.uint8).copy_(content[: buffer.numel() * buffer.element_size()])
        self.pending += 1
        return 0

    def wait(self) -> int:
        done, self.pending = self.pending, 0
        return done

    def new_cpu_locked_tensor(self, numel: int, like: Tensor) -> Tensor:
        made = torch.empty(numel, dtype=like.dtype)
        self.locked[made.data_ptr()] = made.numel() * made.element_size(), made
        return made

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return self.locked.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + size for start, (size, _) in self.locked.items())


def install() -> None:
    """For this process."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    class Extension:
        aio_handle = Handle

    swappers: tuple[Any, ...] = (optimizer_utils, partitioned_param_swapper)
    for swapper in swappers:
        swapper.MIN_AIO_BYTES = 1024
    AsyncIOBuilder.load = lambda self, verbose=True: Extension
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
