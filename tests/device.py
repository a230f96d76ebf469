"""A device of our own beside the CPU, so that what would break on a GPU breaks here.

Tensors on `DEVICE` hold their values on the CPU, but an operation that mixes them with tensors of another device is refused as CUDA
refuses it, and every time the host has to wait for a value (``item``, ``tolist``, a boolean mask, a copy to the CPU) is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)
OTHER, THIRD = torch.device(NAME, 1), torch.device(NAME, 2)
"""More of them, as a device map gives."""


class There(torch.Tensor):
    """A tensor on one of the two devices; `held` is its value on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.held!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of Elsewhere")


class Literals(TorchFunctionMode):
    """``torch.tensor`` never reaches a dispatch mode on a device without kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], There):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(x, dtype=torch.long) if isinstance(x, list) else x for x in places)
            return func(args[0], places, *args[2:])
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != NAME:
            return func(*args, **kwargs)
        args = tree_map_only(There, lambda x: x.held, args)
        made = func(*args, **{**kwargs, "device": "cpu"})
        return There(made, torch.device(device))


class Elsewhere(TorchDispatchMode):
    """Inside, `DEVICE` and `OTHER` can be used. `waits`: operation → how often the host waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.literals = Literals()

    def __enter__(self) -> Elsewhere:
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.waits)


def run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    name = func.overloadpacket.__name__
    given = {x.device for x in tensors if isinstance(x, There)}
    wanted = kwargs.get("device")
    wanted = torch.device(wanted) if wanted is not None else None
    ours = wanted is not None and wanted.type == NAME
    if not given and not ours:
        return func(*args, **kwargs)
    moves = name in ("_to_copy", "copy_")
    if not moves and (len(given) > 1 or any(not isinstance(x, There) and x.dim() for x in tensors)):
        if not (name.startswith("index") and len(given) == 1):
            raise RuntimeError(f"{name}: tensors on {sorted({str(x.device) for x in tensors})}")
        if name != "index" and not isinstance(args[0], There):
            raise RuntimeError(f"{name}: a tensor on the CPU indexed by one on the accelerator")
        waits["index copied to the device"] += 1
    masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    to_host = name == "_to_copy" and wanted is not None and wanted.type == "cpu"
    if masked or to_host or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
        waits["boolean mask" if masked else name] += 1
    held = tree_map_only(There, lambda x: x.held, (args, kwargs))
    if ours or (moves and wanted is not None):
        held[1]["device"] = torch.device("cpu")
    out = func(*held[0], **held[1])
    if to_host:
        return out
    place = wanted if ours else next(iter(given)) if name != "copy_" else args[0].device
    if name.endswith("_") and not name.startswith("__") and args and isinstance(args[0], Tensor):
        return args[0]

    def wrap(x: Any) -> Any:
        return There(x, place) if isinstance(x, Tensor) else x

    return tree_map(wrap, out)


def there(values: Any, device: torch.device = DEVICE) -> Any:
    """Every tensor of `values` on `device`, the same values."""
    return tree_map_only(Tensor, lambda value: There(held(value), device), values)


def moved(module: nn.Module, device: torch.device) -> None:
    """Parameters and buffers of `module` on `device`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(There(held(parameter.data), device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = There(held(buffer), device)


def held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, There) else value
