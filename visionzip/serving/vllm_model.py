"""A compressed model inside of vLLM: its Transformers backend, with this library's processor and encoder path.

vLLM builds the inner model without weights (``AutoModel.from_config``), replaces the LLM's layers by its own and fills them. Here
the vision encoder and the projector stay as transformers has them, since adapters read an encoder's own query and key projections,
and `Family` gives the visual tokens. Without this class the backend would take the first ``K`` of the encoder's ``N`` features for
the ``K`` placeholders that a compressed processor writes, and say nothing.

Written for vLLM 0.32; `tests/serve` runs it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
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
from visionzip.families.mrope import KINDS, GridOutput, RopeIndex
from visionzip.intercept import Scoped
from visionzip.serving.bare import Budgets, family_of, family_of_config, stored_config
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
    """Writes beside each image what is kept of it: its budget, its number of tokens, a digest of its pixels."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        options = dict(hf_kwargs)
        budget = options.pop(BUDGET, None)
        if options:
            raise ValueError(
                f"a request's mm_processor_kwargs may contain budget alone, and not {', '.join(sorted(options))}"
            )
        budgets = self.info.budgets(MultiModalProcessingInfo.get_hf_processor(self.info))
        config = budgets.config(budget)  # before anything is processed: a wrong budget is the request's fault
        with _budget.set(budget):
            found = super()._apply_hf_processor_main(mm_items, options)
        for kind, names in budgets.family.inputs.items():
            sizes = found.get(f"{kind}_replacement_sizes")
            if sizes is None:
                continue
            runs = found[f"{kind}_replacement_ids"].split(sizes.tolist())
            counts = [int((run == run.mode().values).sum()) for run in runs]
            digests = [0] * len(counts)
            if hasattr(budgets.family, "frames_apart"):
                rows = found[f"num_{kind}_patches"].flatten().tolist()
                parts = split_items({names[0]: found[names[0]]}, rows)
                digests = [digest_of(part[names[0]]) for part in parts]
            found[KEPT.format(kind)] = torch.stack(
                [pack_budget(config, count, digest) for count, digest in zip(counts, digests, strict=True)]
            )
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


def digest_of(pixels: Tensor) -> int:
    """48 bits of the content of an image's pixels."""
    values = pixels.contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(values, digest_size=6).digest(), "big")


class Remembered:
    """The newest `size` values by key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any) -> Any:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Any, value: Any) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self.size:
            self._values.popitem(last=False)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedProcessor, info=CompressedProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class CompressedForConditionalGeneration(TransformersMultiModalForCausalLM):
    """What the plugin registers for every family."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self.zip = stored_config(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.family = family_of(self.model)
        self.family.check(self.zip)
        #: visual tokens of images whose positions had to be known first, until the engine asks for their embeddings
        self._waiting = Remembered(64)
        self._kept = Remembered(4096)

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
        for found, (_, wanted, _) in zip(embeddings, kept, strict=True):
            if len(found) != wanted:
                raise RuntimeError(
                    f"{len(found)} visual tokens for {wanted} placeholders of one {kind}: a fault of visionzip-ft"
                )
        return embeddings

    def _compress(self, items: Sequence[Item], kept: Sequence[tuple[ZipConfig, int, int]]) -> list[Any]:
        """`Family.compress` once for each budget, whatever the number of images."""
        found: list[Any] = [
            self._waiting.get((digest, format_budget(config))) if digest else None for config, _, digest in kept
        ]
        budgets = {format_budget(config): config for config, _, _ in kept}
        for name, config in budgets.items():
            places = [
                place for place, each in enumerate(kept) if format_budget(each[0]) == name and found[place] is None
            ]
            if not places:
                continue
            batch = {
                name: value.to(self._device) for name, value in batch_items([items[place] for place in places]).items()
            }
            for place, tokens in zip(places, self.family.compress(config, **batch), strict=True):
                found[place] = tokens
        return found

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """``(3, L)`` positions and how far the next token's is ahead of its number: those of the full layout, at the places that
        are kept.

        The engine asks when a request arrives, before anything is encoded, and what is kept is known only then: images are encoded
        here, one by one, and their visual tokens wait for `embed_multimodal`.
        """
        outputs: dict[str, GridOutput] = {}
        kinds = torch.zeros(1, len(input_tokens), dtype=torch.long)
        for kind, (number, *_) in KINDS.items():
            features = [feature for feature in mm_features if feature.modality == kind]
            for feature in features:
                place = feature.mm_position
                run = slice(place.offset, place.offset + place.length)
                kinds[0, run][slice(None) if place.is_embed is None else place.is_embed] = number
            if features:
                found = [self._places(kind, feature.data) for feature in features]
                outputs[kind] = GridOutput(
                    kept=[kept for kept, _ in found], grids=torch.stack([grid for _, grid in found])
                )
        index = RopeIndex(self.model, getattr(self.family, "frames_apart", False))
        positions, ahead = index(torch.tensor([input_tokens]), mm_token_type_ids=kinds, mm_encoder_outputs=outputs)
        return positions[:, 0], int(ahead[0])

    def _places(self, kind: str, data: Any) -> tuple[Tensor, Tensor]:
        """Of one image: what is kept of each frame ``(t, K)``, and its grid ``(3,)``; both on the CPU."""
        values = data.get_data()
        config, tokens, digest = unpack_budget(values[KEPT.format(kind)], self.zip)
        known = self._kept.get((digest, format_budget(config)))
        if known is None:
            names = self.family.inputs[kind]
            item = {name: values[name] if name == names[0] else values[name].unsqueeze(0) for name in names}
            [visual] = self._compress([item], [(config, tokens, digest)])
            known = visual["kept"].cpu(), visual["grid"].cpu()
            self._kept.put((digest, format_budget(config)), known)
            self._waiting.put((digest, format_budget(config)), visual)
        return known

    @property
    def _device(self) -> torch.device:
        return next(self.family.encoder_module.parameters()).device


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` at the dotted `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
