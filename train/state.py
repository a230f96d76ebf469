"""What an optimizer step needs, independent of how it is laid out: float32 master weights and moments by parameter name.

DeepSpeed's own checkpoints belong to one ZeRO stage and one number of processes. Here every tensor is assembled whole, one
at a time, and put back the same way, so that any stage and any number of processes can go on from it. What is trained is small
(some 20 M parameters for a projector), so this costs a moment.

Layouts: `plain` (no ZeRO, weights are their own masters), `unfused` (ZeRO-0 in half precision), `flat` (ZeRO-1, 2), `sharded` (ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW; trainer.optim allows no other
WEIGHT = "weight"


class MasterState:
    """Reads and writes the training state of a prepared model. Every method is collective: all ranks must call it."""

    def __init__(self, model: nn.Module, wrapped: nn.Module, optimizer: Any) -> None:
        """`wrapped` is the DeepSpeed engine, or anything without one; `optimizer` the trainer's."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.zero = getattr(wrapped, "optimizer", None) if hasattr(wrapped, "zero_optimization_stage") else None
        inner = self.zero if self.zero is not None else optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        self.inner: torch.optim.Optimizer = inner
        self.layout = self._layout()

    def _layout(self) -> str:
        first = next(iter(self.parameters.values()))
        if self.zero is None or self.zero is self.inner:
            return "plain"
        if hasattr(first, "ds_id"):
            return "sharded"
        return "flat" if hasattr(first, "_hp_mapping") else "unfused"

    # Reading

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`weight/<parameter>`, `exp_avg/<parameter>` … whole, float32, on the CPU; one at a time."""
        self._link_moments()
        for name, parameter in self.parameters.items():
            for kind in (WEIGHT, *MOMENTS):
                yield f"{kind}/{name}", self._read(parameter, kind).detach().float().cpu().reshape(shape_of(parameter))

    def step(self) -> int:
        """How many optimizer steps the moments have seen.

        Raises:
            RuntimeError: when there is no state yet, or parameters were stepped unequally often.
        """
        counts = {int(state["step"]) for state in self.inner.state.values() if "step" in state}
        if len(counts) != 1:
            raise RuntimeError(
                f"the optimizer has seen {sorted(counts) or 'no'} steps; expected one number for all parameters"
            )
        return counts.pop()

    def _read(self, parameter: Tensor, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.layout in ("flat", "sharded"):
            value = (
                safe_get_full_fp32_param(parameter)
                if kind == WEIGHT
                else safe_get_full_optimizer_state(parameter, kind)
            )
            if value is None:
                raise RuntimeError(f"DeepSpeed gave no {kind} for a parameter of shape {tuple(shape_of(parameter))}")
            return value
        master = self._master(parameter)
        return master if kind == WEIGHT else self.inner.state[master][kind]

    def _master(self, parameter: Tensor) -> Tensor:
        if self.layout == "plain":
            return parameter
        groups = zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True)  # type: ignore[union-attr]
        return next(high for low_group, high_group in groups
                    for low, high in zip(low_group, high_group, strict=True) if low is parameter)  # fmt: skip

    # Writing

    def load(self, tensors: Any, step: int) -> None:
        """Put everything back into a fresh optimizer.

        Args:
            tensors: name → whole tensor on this rank, as a callable; asked for in the order of `tensors()` on every rank.
            step: what `step()` said.
        """
        self._make_moments(step)
        for name, parameter in self.parameters.items():
            for kind in (WEIGHT, *MOMENTS):
                self._write(parameter, kind, tensors(f"{kind}/{name}"))
        self._refresh_weights()

    @torch.no_grad()
    def _make_moments(self, step: int) -> None:
        """A fresh optimizer has no state until its first step; give it the entries that this step would make."""
        if self.layout == "sharded":
            # ZeRO-3 keeps the groups' parameter lists empty between steps, and one group may own several partitions.
            flat = list(self.zero.fp32_partitioned_groups_flat)  # type: ignore[union-attr]
        else:
            flat = [p for group in self.inner.param_groups for p in group["params"]]
        counts_in_python = type(self.inner).__module__.startswith("deepspeed")  # its Adams count with an int
        fused = bool(self.inner.defaults.get("fused"))
        for master in flat:
            # A tensor for each: torch's AdamW counts in place, and a shared one would count several times a step.
            count = step if counts_in_python else torch.tensor(float(step), device=master.device if fused else None)
            self.inner.state[master] = {"step": count, **{kind: torch.zeros_like(master.data) for kind in MOMENTS}}
        if hasattr(self.inner, "ds_opt_adam"):
            replay(self.inner, step)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let each parameter find its piece of the flat moments.

        DeepSpeed 0.19.8 does this after the first step of the first parameter group, when the others have no moments yet.
        """
        if self.layout == "flat":
            self.zero._hp_optimizer_states_linked = False  # type: ignore[union-attr]
            self.zero._lazy_init_hp_params_optimizer_state()  # type: ignore[union-attr]

    @torch.no_grad()
    def _write(self, parameter: Any, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.layout == "flat":
            if kind == WEIGHT:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)
        elif self.layout == "sharded":
            self._write_part(parameter, kind, local_part(value, parameter))
        else:
            master = self._master(parameter)
            target = master if kind == WEIGHT else self.inner.state[master][kind]
            target.data.copy_(value.view_as(target))

    def _write_part(self, parameter: Any, kind: str, part: Tensor) -> None:
        """This rank's partition.

        Not through DeepSpeed's setters (0.19.8): the "full" ones can't handle a parameter whose size the ranks do not divide.
        """
        zero: Any = self.zero
        state, _ = zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=None if kind == WEIGHT else kind
        )
        if state.numel() != part.numel():
            raise RuntimeError(f"a partition of {kind} has {state.numel()} elements; expected {part.numel()}")
        state.data.copy_(part.view_as(state))

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """The weights that the model computes with, from their masters."""
        if self.layout == "flat":
            self.zero.update_lp_params()  # type: ignore[union-attr]
        elif self.layout == "unfused":
            for low_group, high_group in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):  # type: ignore[union-attr]
                for low, high in zip(low_group, high_group, strict=True):
                    low.data.copy_(high.data)
        elif self.layout == "sharded":
            for group in range(len(self.zero.fp16_groups)):  # type: ignore[union-attr]
                self.zero._reassign_or_swap_out_partitioned_parameters(group)  # type: ignore[union-attr]
            if self.zero.persistent_parameters:  # type: ignore[union-attr]
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)  # type: ignore[union-attr]


def replay(adam: Any, step: int) -> None:
    """Let DeepSpeed's C++ Adam count to `step`. It multiplies the powers of its betas up from step to step; taken at once, as it
    does when it is handed another step than the next, their last bits are others than those of a run that was never stopped."""
    group = adam.param_groups[0]
    nothing = [torch.zeros(1) for _ in range(4)]
    for number in range(1, step + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, *group["betas"], group["eps"], 0.0, True, *nothing)


def shape_of(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def local_part(value: Tensor, parameter: Any) -> Tensor:
    """This rank's piece of a whole tensor, padded with zeros like the last rank's partition."""
    numel, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank(group=parameter.ds_process_group)
    flat = value.reshape(-1)[numel * rank : numel * (rank + 1)]
    return torch.nn.functional.pad(flat, (0, numel - flat.numel()))
