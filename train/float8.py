"""`model.frozen_dtype: float8`: the linear layers of a frozen LLM in 8-bit floating point, through torchao.

Weights are converted once, when the model is built (e4m3, one scale per matrix), and read by both passes: the forward multiplies them with
activations in e4m3, the backward with gradients in e5m2, each scaled by its own maximum at that step (Micikevicius et al. 2022,
arXiv 2209.05433). torchao's `Float8Linear` converts trained weights at each step, keeps activations for a gradient of the weights and
computes that gradient; none of this is needed where weights are frozen.

GPUs multiply these from compute capability 8.9 (Ada, Hopper) on. On a CPU torchao emulates it in float32: equal rounding, no gain in speed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from train.config import ConfigError
from visionzip.families import Family
from visionzip.fingerprint import fingerprint, remember_fingerprint

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of both sides of a matrix, for the kernel
LEAST_CAPABILITY = (8, 9)


def check_float8() -> None:
    """Raises ConfigError: without torchao, or on a GPU that is too old."""
    try:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it names each kernel that this machine can't load
        import torchao.float8  # noqa: F401
    except ImportError:
        raise ConfigError("model.frozen_dtype needs torchao; pip install 'visionzip-ft[float8]'") from None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        here = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ConfigError(
            f"model.frozen_dtype=float8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), and this one has {here}; "
            "leave it out"
        )


def matmul_config() -> Any:
    """torchao's `LinearMMConfig`: emulated where there is no GPU."""
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    emulate = not torch.cuda.is_available()
    forward = ScaledMMConfig(emulate=emulate, use_fast_accum=True)
    backward = ScaledMMConfig(emulate=emulate, use_fast_accum=False)
    return LinearMMConfig(output=forward, grad_input=backward, grad_weight=backward)


def convert(values: Tensor, dtype: torch.dtype, role: str) -> Any:
    """`values` (any, any) as torchao's `Float8TrainingTensor`; `role`: INPUT, WEIGHT or GRAD_OUTPUT. Scales are powers of two, so that a
    weight that is one is exact."""
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import GemmInputRole

    return hp_tensor_to_float8_dynamic(
        values, dtype, matmul_config(), gemm_input_role=GemmInputRole[role], round_scales_to_power_of_2=True
    )


class FrozenProduct(torch.autograd.Function):
    """x (rows, in), stored weight (out, in) in e4m3 and its scale () → (rows, out). The gradient is that of `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return convert(x, FORWARD, "INPUT") @ as_float8(weight, scale, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return convert(gradient, BACKWARD, "GRAD_OUTPUT") @ as_float8(weight, scale, gradient.dtype), None, None


def as_float8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
    from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

    return Float8TrainingTensor(weight, scale, dtype, matmul_config(), GemmInputRole.WEIGHT)


class FrozenFloat8Linear(nn.Module):
    """A frozen `nn.Linear` in float8; input and output keep the input's dtype.

    Weight and scale are buffers of integers of the same width, which no `model.bfloat16()` rounds, and are in no state dict.
    """

    weight_bits: Tensor
    scale_bits: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        converted = convert(linear.weight.detach(), FORWARD, "WEIGHT")
        self.register_buffer("weight_bits", converted._data.view(torch.uint8), persistent=False)
        self.register_buffer("scale_bits", converted._scale.float().view(torch.int32), persistent=False)

    @torch._dynamo.disable  # torchao's tensors break off a graph anyway
    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.weight_bits.view(FORWARD), self.scale_bits.view(torch.float32)
        rows = x.reshape(-1, self.in_features).contiguous()
        product = FrozenProduct.apply(rows, weight, scale).reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, float8"


def freeze_in_float8(model: nn.Module, family: Family) -> int:
    """Replace the linear layers of the LLM's trunk in place; the head, the encoder and the projector stay. → how many.

    The model is fingerprinted before: what is trained against it belongs to the model in its own dtype.
    """
    check_float8()
    llm = model.get_submodule(family.llm)
    remember_fingerprint(llm, fingerprint(model, {"llm": family.llm})["llm"])
    chosen = [
        name
        for name, module in llm.named_modules()
        if type(module) is nn.Linear and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
    ]
    for name in chosen:
        linear = llm.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        llm.set_submodule(name, FrozenFloat8Linear(linear))
    return len(chosen)
