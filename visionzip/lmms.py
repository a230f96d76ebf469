"""A model for lmms-eval: ``lmms-eval --model visionzip --model_args pretrained=…,dominant=54,contextual=10 --tasks gqa,pope``.

lmms-eval finds this file through the entry point ``lmms_eval.models`` of the installed package.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from PIL import Image

from visionzip.attach import attached, detach
from visionzip.config import ZipConfig
from visionzip.export.card import budget_words
from visionzip.images import prepare_image
from visionzip.loading import load

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        "visionzip.lmms is a model for lmms-eval, which is not installed here; docs/evaluation.md says how to install it"
    ) from error

IMAGE = "<image>"  # how lmms-eval's tasks mark a picture's place in a question
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
PASSED_ON = ("temperature", "top_p", "num_beams", "max_new_tokens")


def manifest() -> Any:
    """What lmms-eval asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="visionzip", simple_class_path="visionzip.lmms.VisionZip", aliases=("visionzip-ft",))


class VisionZip(lmms):
    """Any model this toolkit can load, compressed.

    Args (``--model_args``):
        pretrained: a model, or what was fine-tuned, in any format: directory or hub id.
        dominant, contextual, selector, merge, layer: what to keep; default: what a projector was trained with.
        full: true runs the same model and projector with all tokens, the reference the paper's shares are taken of.
        base: the model a projector belongs to, where that is not the one it names.
        template: ``chat``, the processor's own; ``llava_v1``, what LLaVA-1.5 (and the paper) was evaluated with.
        pad: pad pictures to squares where the processor would crop them (default), as LLaVA and the training here do.
        dtype, device, attn_implementation: as in ``from_pretrained``.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dominant: int | float | None = None,
        contextual: int | float | None = None,
        selector: str | None = None,
        merge: str | None = None,
        layer: int | None = None,
        full: bool = False,
        base: str | None = None,
        template: str = "chat",
        pad: bool = True,
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
        if template not in ("chat", "llava_v1"):
            raise ValueError(f"--model_args: template={template}; expected chat or llava_v1")
        self.accelerator = _accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = {"dominant": dominant, "contextual": contextual, "selector": selector, "merge": merge, "layer": layer}
        asked = {name: value for name, value in asked.items() if value is not None}
        more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
        config = ZipConfig.model_validate(asked) if asked else None
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.model, self.processor = load(pretrained, self.device, dtype, config=config, base=base, **more)
        attachment = attached(self.model)
        assert attachment is not None
        self.budget = "all visual tokens" if full else budget_words(attachment.config)
        if full:
            detach(self.model)
        self.template, self.pad = template, pad
        self.batch_size = int(batch_size)
        self.processor.tokenizer.padding_side = "left"

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
        texts, pictures = [], []
        for request in requests:
            question, _, doc_to_visual, doc_id, task, split = request.args
            shown = [self._picture(visual) for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or []]
            texts.append(self._prompt(question, len(shown)))
            pictures.append(shown)
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=[shown for shown in pictures if shown] or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (start and texts[0].startswith(start)),
        ).to(self.device, dtype=self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **sampling(settings))
        new = output[:, inputs["input_ids"].shape[1] :]
        return [cut(text, settings.get("until")) for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _picture(self, visual: Any) -> Image.Image:
        if not isinstance(visual, Image.Image):
            raise ValueError(f"this model answers about pictures; the task gave a {type(visual).__name__}")
        picture = visual.convert("RGB")
        return prepare_image(picture, self.processor, "auto" if self.pad else False)

    def _prompt(self, question: str, pictures: int) -> str:
        parts = parts_of(question, pictures)
        if self.template == "chat" and getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        mark = self.processor.image_token
        first = mark + "\n" if parts[0]["type"] == "image" else ""
        text = "".join(mark if part["type"] == "image" else part["text"] for part in parts[1 if first else 0 :])
        return f"{SYSTEM} USER: {first}{text} ASSISTANT:"

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what the model would say."""
        found = []
        for request in requests:
            question, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            shown = [self._picture(visual) for visual in doc_to_visual(doc) or []]
            answer = target(doc) if callable(target) else target
            inputs = self.processor(text=self._prompt(question, len(shown)), images=shown or None, return_tensors="pt")
            ids = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs["input_ids"] = torch.cat((inputs["input_ids"], ids), dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs.pop("mm_token_type_ids", None)
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.device, dtype=self.model.dtype)).logits[0, -ids.shape[1] - 1 : -1]
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


ARGUMENTS = "pretrained, dominant, contextual, selector, merge, layer, full, base, template, pad, dtype, device, attn_implementation"


def _accelerator() -> Any:
    """One process, or one of several that ``accelerate launch`` started."""
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def parts_of(question: str, pictures: int) -> list[dict[str, str]]:
    """A question as parts of a message: pictures where it marks them if it marks them all, else in front."""
    pieces = re.split(re.escape(IMAGE), question)
    text = [{"type": "text", "text": piece} for piece in pieces]
    if len(pieces) - 1 != pictures:
        return [{"type": "image"}] * pictures + [{"type": "text", "text": question.replace(IMAGE, "").strip()}]
    parts = [text[0]]
    for piece in text[1:]:
        parts += [{"type": "image"}, piece]
    return [part for part in parts if part["type"] == "image" or part["text"].strip()] or [text[0]]


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
