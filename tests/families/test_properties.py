"""What every family must do. One test a property; ``docs/models.md`` shows the outcome for each family.

A property that does not apply to a family is not collected for it; the case says why (`Case.exempt`), and the table shows it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.families.case import Case, cases, make_image, video
from visionzip import attach, attached, detach, load
from visionzip.export import load_into, save_projector
from visionzip.projector import projector_state

CASES = cases()


def every_family(property_name: str) -> Any:
    """Parametrise over the families a property applies to."""
    applies = [case for case in CASES if property_name not in case.exempt]
    return pytest.mark.parametrize("case", applies, ids=lambda case: case.name)


def make_images(case: Case, count: int = 1, first: int = 0) -> list[Any]:
    return [make_image(first + index, case.sizes[(first + index) % len(case.sizes)]) for index in range(count)]


def ready(case: Case, attention: str = "sdpa", **budget: Any) -> tuple[Any, Any]:
    """An attached model and its processor."""
    model, processor = case.model(attention), case.processor()
    return attach(model, processor, case.budget, **budget), processor


def new_tokens(model: Any, inputs: dict[str, Any], count: int = 4, **kwargs: Any) -> Tensor:
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def same_logits(found: Tensor, expected: Tensor, inputs: dict[str, Any]) -> None:
    """Equal wherever there is text; what attention gives at padding is nobody's business."""
    there = inputs["attention_mask"].bool()
    close(found[there], expected[there])


@every_family("selection")
@torch.no_grad()
def test_selection(case: Case) -> None:
    """Logits are those of the slow reference's tokens in the untouched language model."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt(), case.prompt(0)], [make_images(case), []])
    untouched = case.model("eager")
    features = case.reference(untouched, case.budget, inputs)
    found = attached(model).project(attached(model).compress(**case.image_inputs(inputs)))
    for ours, slow in zip(found, features["image"], strict=True):
        close(ours, slow)
    same_logits(model(**inputs).logits, case.logits(untouched, inputs, features), inputs)


@every_family("everything")
@torch.no_grad()
def test_everything(case: Case) -> None:
    """A budget that keeps every token gives the uncompressed model's logits on the same tokens."""
    model, processor = case.model(), case.processor()
    attach(model, processor, case.everything())
    inputs = case.process(processor, [case.prompt()], [make_images(case)])
    untouched = case.model()
    features = case.uncompressed(untouched, inputs)
    same_logits(model(**inputs).logits, case.logits(untouched, inputs, features), inputs)


@every_family("sdpa_eager")
@torch.no_grad()
def test_sdpa_eager(case: Case) -> None:
    """Scores come from q and k of one layer, so the attention implementation does not matter."""
    (sdpa, processor), (eager, _) = ready(case), ready(case, "eager")
    inputs = case.process(processor, [case.prompt(2)], [make_images(case, 2)])
    for a, b in zip(*(attached(m).compress(**case.image_inputs(inputs)) for m in (sdpa, eager)), strict=True):
        if isinstance(a, Tensor):
            a, b = {"tokens": a}, {"tokens": b}
        for name in a:
            close(a[name], b[name])


@every_family("placeholders")
def test_placeholders(case: Case) -> None:
    """As many placeholders as tokens, whatever the size; and `token_counts` knows both numbers."""
    stock = case.processor()
    model, processor = ready(case)
    for size in case.many_sizes:
        inputs = case.process(processor, [case.prompt()], [[make_image(0, size)]])
        now = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert now == case.count(case.budget, size), size
        before = stock_count(case, stock, model, size)
        counts = attached(model).token_counts(**case.image_inputs(inputs))
        assert case.whole_images(counts) == [(before, now)], size
        if not hasattr(type(stock), "_get_num_multimodal_tokens"):
            continue  # SmolVLM's can't be asked
        told, told_before = (p._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])]) for p in (processor, stock))
        others = told_before["num_image_tokens"][0] - before  # some processors count separators as well
        assert told["num_image_tokens"] == [now + others], size


def stock_count(case: Case, stock: Any, model: Any, size: tuple[int, int]) -> int:
    inputs = case.process(stock, [case.prompt()], [[make_image(0, size)]])
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


@every_family("generate")
def test_generate(case: Case) -> None:
    """With a KV cache and without, and beams; the encoder runs once."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()], [make_images(case)])
    runs = []
    tower = model.get_submodule(attached(model).family.tower)
    block = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))[0]
    block.register_forward_hook(lambda *_: runs.append(1))
    cached = new_tokens(model, inputs)
    assert len(runs) == 1
    assert torch.equal(cached, new_tokens(model, inputs, use_cache=False))
    beams = new_tokens(model, inputs, 3, num_beams=2)
    assert torch.equal(beams, new_tokens(model, inputs, 3, num_beams=2, use_cache=False))


@every_family("mixed_batch")
@torch.no_grad()
def test_mixed_batch(case: Case) -> None:
    """Image sizes, numbers of images and text-only rows mixed: each row as if it were alone."""
    model, processor = ready(case)
    texts = [
        case.prompt(1),
        case.prompt(0),
        case.prompt(2, question="how many"),
        case.prompt(1, question="is this red"),
    ]
    rows = [make_images(case), [], make_images(case, 2, 1), make_images(case, 1, 3)]
    batch = case.process(processor, texts, rows)
    together, logits = new_tokens(model, batch), model(**batch).logits[:, -1]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        alone = case.process(processor, [text], [row])
        assert torch.equal(new_tokens(model, alone)[0], together[index])
        if index != 1:  # forward, unlike generate, does not give padded rows their own positions
            close(new_logits(model, alone)[0], new_logits(model, batch)[index])
    assert torch.isfinite(logits).all()


def new_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.logits[0]


@every_family("multi_turn")
def test_multi_turn(case: Case) -> None:
    """Second turn text only, third turn a new image, on the first turn's cache: as if all were computed again."""
    model, processor = ready(case)
    text, shown, cache = "", [], None
    for turn, count in enumerate(case.turns):
        fresh = make_images(case, count, len(shown))
        text += (" </s> " if turn else "") + case.prompt(len(fresh), question="how many" if turn else "what is this")
        shown = shown + fresh
        whole = case.process(processor, [text], [shown])
        inputs = dict(whole)
        if turn and fresh:
            inputs = case.only(whole, len(shown) - len(fresh))
        elif turn:
            inputs = {k: v for k, v in whole.items() if k not in case.image_inputs(whole)}
        if cache is not None:
            inputs["past_key_values"] = cache
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = output.past_key_values
        answer = output.sequences[:, whole["input_ids"].shape[1] :]
        assert torch.equal(answer, new_tokens(model, whole, 3)), f"turn {turn}"
        text += " " + processor.tokenizer.decode(answer[0])


@every_family("attach_detach")
@torch.no_grad()
def test_attach_detach(case: Case) -> None:
    """Detached, model and processor are as they were: attributes, hooks, config, prompts and outputs, bit for bit."""
    model, processor = case.model(), case.processor()
    owners = [processor, *model.modules()]
    before = [list(owner.__dict__) for owner in owners]
    hooks = [hook_count(module) for module in model.modules()]
    config = model.config.to_dict()
    attach(model, processor, case.budget)
    new_tokens(model, case.process(processor, [case.prompt()], [make_images(case)]), 2)
    detach(model)
    assert attached(model) is None
    assert [list(owner.__dict__) for owner in owners] == before
    assert [hook_count(module) for module in model.modules()] == hooks
    assert model.config.to_dict() == config
    untouched = case.model()
    inputs, expected = (case.process(p, [case.prompt()], [make_images(case)]) for p in (processor, case.processor()))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(model(**inputs).logits, untouched(**expected).logits)


def hook_count(module: torch.nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


@every_family("save_load")
@torch.no_grad()
def test_save_load(case: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained projector goes to disk and comes back, into a fresh model and through `visionzip.load`."""
    model, processor = ready(case)
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    if case.needs_torchvision:
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_a, **_k: case.processor())
    else:
        case.processor().save_pretrained(tmp_path / "base")
    for name in attached(model).projector_names:
        for parameter in model.get_submodule(name).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_projector(model, tmp_path / "out")
    inputs = case.process(processor, [case.prompt()], [make_images(case)])
    expected = model(**inputs).logits

    fresh, _ = ready(case)
    assert not torch.equal(fresh(**inputs).logits, expected)
    load_into(fresh, tmp_path / "out")
    assert all(torch.equal(value, projector_state(fresh)[key]) for key, value in projector_state(model).items())
    assert torch.equal(fresh(**inputs).logits, expected)

    loaded, its_processor = load(tmp_path / "out", device="cpu")
    again = case.process(its_processor, [case.prompt()], [make_images(case)])
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    close(loaded(**again).logits, expected)


@every_family("gradient")
def test_gradient(case: Case) -> None:
    """Every projector parameter gets the slow path's gradient (relative error below 1e-5), and nothing else gets one."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt(), case.prompt(0)], [make_images(case), []])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 19, -100)  # placeholders
    names = attached(model).projector_names
    found = only_projector(model, names)
    model(**inputs, labels=labels).loss.backward()

    untouched = case.model("eager")
    expected = only_projector(untouched, names)
    logits = case.logits(untouched, inputs, case.reference(untouched, case.budget, inputs))
    untouched.loss_function(logits, labels, vocab_size=untouched.config.get_text_config().vocab_size).backward()
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 1e-5, f"{name}: {error}"
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == list(found)


def only_projector(model: Any, names: list[str]) -> dict[str, torch.nn.Parameter]:
    """Everything trains but the encoder is under no_grad anyway; what must get a gradient, by name."""
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_family("frozen")
def test_frozen(case: Case) -> None:
    """The encoder keeps nothing for backward, even where its parameters ask for a gradient."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt()], [make_images(case)])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    attachment = attached(model)
    tower = model.get_submodule(attachment.family.tower)
    projector = {id(p) for name in attachment.projector_names for p in model.get_submodule(name).parameters()}
    assert all(p.grad is None for p in tower.parameters() if id(p) not in projector)


@every_family("token_cache")
@torch.no_grad()
def test_token_cache(case: Case, tmp_path: Any) -> None:
    """Tokens stored per image and used later, in another batch, give the logits of the pixels."""
    model, processor = ready(case)
    inputs = case.process(processor, [case.prompt(), case.prompt()], [make_images(case), make_images(case, 1, 1)])
    attachment = attached(model)
    for index in range(2):
        alone = case.process(processor, [case.prompt()], [make_images(case, 1, index)])
        torch.save(attachment.compress(**case.image_inputs(alone)), tmp_path / str(index))
    stored = [entry for index in range(2) for entry in torch.load(tmp_path / str(index), weights_only=True)]
    text = {name: value for name, value in inputs.items() if name not in case.image_inputs(inputs)}
    close(model(**text, mm_encoder_outputs=attachment.encoder_outputs(stored)).logits, model(**inputs).logits)


@every_family("video")
@torch.no_grad()
def test_video(case: Case) -> None:
    """Selection, everything kept, placeholders, cached generation, and a video beside an image in one batch."""
    model, processor = ready(case)
    clips = [video(0, case.frames)]
    inputs = case.process(processor, [case.prompt(0, 1)], None, clips)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == case.video_count(case.budget, case.frames)
    untouched = case.model("eager")
    close(model(**inputs).logits, case.logits(untouched, inputs, case.reference(untouched, case.budget, inputs)))
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, use_cache=False))
    beams = new_tokens(model, inputs, 3, num_beams=2)
    assert torch.equal(beams, new_tokens(model, inputs, 3, num_beams=2, use_cache=False))
    before = (
        case.process(case.processor(), [case.prompt(0, 1)], None, clips)["input_ids"] == model.config.video_token_id
    )
    now = inputs["input_ids"] == model.config.video_token_id
    assert attached(model).token_counts(**case.image_inputs(inputs)) == [(int(before.sum()), int(now.sum()))]

    attachment, media = attached(model), case.image_inputs(inputs)
    text = {name: value for name, value in inputs.items() if name not in media}
    stored = attachment.encoder_outputs(attachment.compress(**media), "video")
    close(model(**text, mm_encoder_outputs=stored).logits, model(**inputs).logits)

    texts = [case.prompt(0, 1), case.prompt(1), case.prompt(0)]
    both = case.process(processor, texts, [[], make_images(case), []], clips)
    together = new_tokens(model, both)
    assert torch.equal(together[0], new_tokens(model, inputs)[0])
    assert torch.equal(together[1], new_tokens(model, case.process(processor, [texts[1]], [make_images(case)]))[0])

    attach(model, processor, case.everything())
    inputs = case.process(processor, [case.prompt(0, 1)], None, clips)
    untouched = case.model()
    close(model(**inputs).logits, case.logits(untouched, inputs, case.uncompressed(untouched, inputs)))
