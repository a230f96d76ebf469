"""A model for lmms-eval: ``lmms-eval --model visionzip --model_args pretrained=…,dominant=54,contextual=10 --tasks gqa,pope``.

lmms-eval finds this file through the entry point ``lmms_eval.models`` of the installed package.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from visionzip.attach import attach, attached
from visionzip.config import ZipConfig
from visionzip.export.card import budget_words
from visionzip.inputs import batch_prompts, prompt_inputs, to_model
from visionzip.loading import load
from visionzip.prompts import Message, Slot, get_template, question, template_names, usual_template
from visionzip.switch import set_budget

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        "visionzip.lmms is a model for lmms-eval, which is not installed here; docs/evaluation.md says how to install it"
    ) from error

IMAGE = "<image>"  # how lmms-eval's tasks mark the place of an image in a question
PASSED_ON = ("temperature", "top_p", "num_beams", "max_new_tokens")


def manifest() -> Any:
    """What lmms-eval asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visionzip", simple_class_path="visionzip.lmms.VisionZip", aliases=("visionzip-ft",))


class VisionZip(lmms):
    """Any model this toolkit can load, compressed.

    Args (``--model_args``):
        pretrained: a model, or what was fine-tuned, in any format: directory or hub id.
        budget: visual tokens per image (64, 54+10, 0.1), or all; default: what a projector was trained with. A projector that was
            trained for several (`ZipConfig.budgets`) answers at any of them.
        dominant, contextual, selector, merge, layer, positions: what to keep, in single values (`ZipConfig`).
        full: true runs the same model and projector with all tokens, the reference the paper's shares are taken of.
        base: the model a projector belongs to, where that is not the one it names.
        template: ``chat``, the processor's own; ``llava_v1``, what LLaVA-1.5 (and the paper) was evaluated with, token by token.
        pad_images: as `ZipConfig.pad_images`; default: what a projector was trained with, else where the processor would crop.
        dtype, device, attn_implementation: as in ``from_pretrained``.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        budget: int | float | str | None = None,
        dominant: int | float | None = None,
        contextual: int | float | None = None,
        selector: str | None = None,
        merge: str | None = None,
        layer: int | None = None,
        positions: str | None = None,
        full: bool = False,
        base: str | None = None,
        template: str = "chat",
        pad_images: bool | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        names = {name: value for name, value in unknown.items() if name not in ("max_batch_size",)}
        if names:
            raise ValueError(f"--model_args: {', '.join(names)} not known; known: {ARGUMENTS}")
        if template not in template_names():
            raise ValueError(f"--model_args: template={template}; expected one of {', '.join(template_names())}")
        self.accelerator = _accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = {"dominant": dominant, "contextual": contextual, "selector": selector, "merge": merge, "layer": layer,
                 "positions": positions}  # fmt: skip
        asked = {name: value for name, value in asked.items() if value is not None}
        more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
        config = ZipConfig.model_validate(asked) if asked else None
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.model, self.processor = load(pretrained, self.device, dtype, config=config, base=base, **more)
        attachment = attached(self.model)
        assert attachment is not None
        if pad_images is not None:
            config = ZipConfig.model_validate({**attachment.config.model_dump(), "pad_images": pad_images})
            attach(self.model, self.processor, config)
            attachment = attached(self.model)
            assert attachment is not None
        self.pad_images = attachment.config.pad_images
        if budget is not None and (full or dominant is not None or contextual is not None):
            raise ValueError("--model_args: budget sets dominant, contextual and full; leave those out")
        if full or budget is not None:
            set_budget(self.model, "all" if full else budget)
        attachment = attached(self.model)
        self.budget = "all visual tokens" if attachment is None else budget_words(attachment.config)
        if template == "chat":  # or what stands in for it where the processor has none
            self.template = usual_template(self.processor)
        else:
            self.template = get_template(template, self.processor)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of `requests`; those with the same settings share batches."""
        from tqdm import tqdm

        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        bar = tqdm(total=len(requests), desc=f"answering ({self.budget})", disable=self.rank != 0)
        for indices in groups.values():
            indices.sort(key=lambda index: len(requests[index].args[0]))  # questions of like length together
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                for index, answer in zip(batch, self._answer([requests[index] for index in batch]), strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args[:2], answer)
                bar.update(len(batch))
        bar.close()
        return answers

    def _answer(self, requests: list[Any]) -> list[str]:
        settings = dict(requests[0].args[1])
        rows = []
        for request in requests:
            text, _, doc_to_visual, doc_id, task, split = request.args
            rows.append(self._row(text, doc_to_visual(self.task_dict[task][split][doc_id]) or []))
        inputs = to_model(self.model, batch_prompts(self.processor, rows))
        with torch.inference_mode():
            output = self.model.generate(**inputs, **sampling(settings))
        new = output[:, inputs["input_ids"].shape[1] :]
        return [cut(text, settings.get("until")) for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _row(self, text: str, visuals: list[Any]) -> dict[str, Any]:
        """A question's ``input_ids`` (L,), and the image inputs of what it shows."""
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"this model answers questions about images; the task gave a {type(visual).__name__}")
        message = message_of(text, len(visuals))
        return prompt_inputs(self.template, [message], visuals, self.pad_images)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what the model would say."""
        found = []
        for request in requests:
            text, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            answer = target(doc) if callable(target) else target
            inputs = batch_prompts(self.processor, [self._row(text, doc_to_visual(doc) or [])])
            ids = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs.pop("mm_token_type_ids", None)
            with torch.inference_mode():
                logits = self.model(**to_model(self.model, inputs)).logits[0, -ids.shape[1] - 1 : -1]
            scores, wanted = logits.float().log_softmax(dim=-1), ids[0].to(self.device)
            likelihood = float(scores.gather(1, wanted[:, None]).sum())
            found.append((likelihood, bool((scores.argmax(dim=-1) == wanted).all())))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not one of the paper's benchmarks asks for this.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("tasks of several rounds are not supported by --model visionzip")


ARGUMENTS = "pretrained, budget, dominant, contextual, selector, merge, layer, positions, full, base, template, pad_images, dtype, device, attn_implementation"


def _accelerator() -> Any:
    """One process, or one of several that ``accelerate launch`` started."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def message_of(text: str, images: int) -> Message:
    """A task's question: images where it marks them if it marks them all, else in front."""
    pieces = text.split(IMAGE)
    if len(pieces) - 1 != images:
        return question(text.replace(IMAGE, "").strip(), images)
    parts: list[str | Slot] = [pieces[0]]
    for index, piece in enumerate(pieces[1:]):
        parts += [Slot("image", index), piece]
    return Message("user", [part for part in parts if isinstance(part, Slot) or part.strip()] or [pieces[0]])


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` → ``generate``'s; greedy unless it asks for a temperature."""
    kept = {name: settings[name] for name in PASSED_ON if settings.get(name) is not None}
    sample = bool(kept.get("temperature"))
    if not sample:
        kept.pop("temperature", None)
        kept.pop("top_p", None)
    return {"max_new_tokens": 1024, **kept, "do_sample": sample}


def cut(text: str, until: Any) -> str:
    """Up to the first of the strings an answer ends at."""
    ends = [until] if isinstance(until, str) else list(until or [])
    for end in ends:
        text = text.split(end)[0] if end else text
    return text.strip()
