"""A compressed model inside of vLLM: its Transformers backend, with this library's processor and encoder path.

vLLM builds the inner model without weights (``AutoModel.from_config``), replaces the LLM's layers by its own and fills them. Here
the vision encoder and the projector stay as transformers has them, since adapters read an encoder's own query and key projections,
and `Family` gives the visual tokens. Without this class the backend would take the first ``K`` of the encoder's ``N`` features for
the ``K`` placeholders that a compressed processor writes, and say nothing.

Written for vLLM 0.32; `tests/serve` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from visionzip.budgets import format_budget
from visionzip.config import ZipConfig
from visionzip.intercept import Scoped
from visionzip.serving.bare import Budgets, check_served, family_of, family_of_config, stored_config
from visionzip.serving.items import KEPT, Item, batch_items, pack_budget, split_items, unpack_budget

#: what a request's ``mm_processor_kwargs`` may say: ``{"budget": 32}``
BUDGET = "budget"
_budget: Scoped[Any] = Scoped("visionzip_serving_budget")


class CompressedProcessingInfo(MultiModalProcessingInfo):
    """Gives the engine a processor that writes as many placeholders as are kept."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        budget = kwargs.pop(BUDGET, None)
        budgets = self.budgets(super().get_hf_processor(**kwargs))
        return budgets.processor(budget if budget is not None else _budget.get())

    def _get_num_mm_tokens(self, **sizes: Any) -> Any:
        """Of the largest budget that a request may name: what memory is reserved for."""
        largest = self.budgets(super().get_hf_processor()).largest_processor
        return largest._get_num_multimodal_tokens(**sizes)

    def budgets(self, stock: Any) -> Budgets:
        """`Budgets` of a processor as transformers loads it; there is one for each set of other options."""
        made: dict[int, tuple[Any, Budgets]] = self.__dict__.setdefault("_budgets", {})
        if id(stock) not in made:
            config = self.get_hf_config()
            with set_current_vllm_config(sizes_only(self.ctx.model_config)):
                family = family_of_config(config)
            made[id(stock)] = stock, Budgets(stock, family, stored_config(config))
        return made[id(stock)][1]


def sizes_only(model_config: Any) -> Any:
    """What vLLM's decorated LLM classes ask of the engine's config when a model without memory is made for its sizes alone."""
    return SimpleNamespace(
        model_config=model_config, compilation_config=SimpleNamespace(mode=CompilationMode.NONE, custom_ops=["none"])
    )


class CompressedProcessor(MultiModalProcessor):
    """Writes beside each image what is kept of it: its budget and its number of tokens."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        options = dict(hf_kwargs)
        budget = options.pop(BUDGET, None)
        if options:
            raise ValueError(
                f"a request's mm_processor_kwargs may contain only budget, not {', '.join(sorted(options))}"
            )
        budgets = self.info.budgets(MultiModalProcessingInfo.get_hf_processor(self.info))
        config = budgets.config(budget)  # before anything is processed: a wrong budget is the request's fault
        with _budget.set(budget):
            found = super()._apply_hf_processor_main(mm_items, options)
        for kind in budgets.family.inputs:
            sizes = found.get(f"{kind}_replacement_sizes")
            if sizes is None:
                continue
            runs = found[f"{kind}_replacement_ids"].split(sizes.tolist())
            counts = [int((run == run.mode().values).sum()) for run in runs]
            found[KEPT.format(kind)] = torch.stack([pack_budget(config, count) for count in counts])
        return found

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        ours = {kind: hf_inputs.pop(KEPT.format(kind), None) for kind in ("image", "video")}
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for kind, value in ours.items():
            if value is not None:
                hf_inputs[KEPT.format(kind)] = value
                fields[KEPT.format(kind)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields


@MULTIMODAL_REGISTRY.register_processor(
    CompressedProcessor, info=CompressedProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class CompressedForConditionalGeneration(TransformersMultiModalForCausalLM):
    """The class that the plugin registers, for every family that is served."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_served(config.model_type)
        self.zip = stored_config(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.family = family_of(self.model)
        self.family.check(self.zip)

    def recursive_replace(self) -> None:
        """vLLM's layers in place of transformers', in the LLM alone."""
        family = family_of(self.model)
        frozen = {name.removeprefix("model.") for name in (*family.projectors, family.tower)}
        hidden = {name: self.model.get_submodule(name) for name in sorted(frozen)}
        for name in hidden:
            set_submodule(self.model, name, nn.Module())
        try:
            super().recursive_replace()
        finally:
            for name, module in hidden.items():
                set_submodule(self.model, name, module)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """``(L_i, hidden)`` of each image or video of a step, through encoder and projector in one batch.

        Raises:
            RuntimeError: when an image has other numbers of visual tokens and of placeholders.
        """
        for kind, names in self.family.inputs.items():
            if kwargs.get(names[0]) is not None:
                return self._embed(kind, names, kwargs)
        return list(super().embed_multimodal(**kwargs))

    def _embed(self, kind: str, names: Sequence[str], kwargs: dict[str, Any]) -> list[Tensor]:
        rows = [int(count) for count in kwargs[f"num_{kind}_patches"].flatten().tolist()]
        items = split_items({name: kwargs[name] for name in names if kwargs.get(name) is not None}, rows)
        kept = [unpack_budget(each, self.zip) for each in kwargs[KEPT.format(kind)]]
        tokens = self._compress(items, kept)
        embeddings = self.family.project(tokens)
        for found, (_, wanted) in zip(embeddings, kept, strict=True):
            if len(found) != wanted:
                raise RuntimeError(
                    f"{len(found)} visual tokens for {wanted} placeholders of one {kind}: this is a bug in visionzip-ft"
                )
        return embeddings

    def _compress(self, items: Sequence[Item], kept: Sequence[tuple[ZipConfig, int]]) -> list[Any]:
        """`Family.compress` once for each budget, whatever the number of images."""
        found: list[Any] = [None] * len(items)
        budgets = [format_budget(config) for config, _ in kept]  # a config with a list in it has no hash
        for budget in dict.fromkeys(budgets):
            places = [place for place, each in enumerate(budgets) if each == budget]
            batch = batch_items([items[place] for place in places])
            inputs = {name: value.to(self._device) for name, value in batch.items()}
            for place, tokens in zip(places, self.family.compress(kept[places[0]][0], **inputs), strict=True):
                found[place] = tokens
        return found

    @property
    def _device(self) -> torch.device:
        return next(self.family.encoder_module.parameters()).device


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` at the dotted `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
