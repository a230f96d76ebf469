"""The chat: same answers as computing everything anew, each image encoded once, and what it prints."""

import pytest
import torch
from PIL import Image

from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, detach
from visionzip.chat import Chat
from visionzip.cli import main
from visionzip.inputs import batch_prompts, prompt_inputs
from visionzip.prompts import usual_template
from visionzip.templates import llava_v1

BUDGET = ZipConfig(dominant=5, contextual=3)
SYSTEM = len(llava_v1.SYSTEM.split())  # the tiny processor has no chat template: it is asked as LLaVA is


@pytest.fixture
def chat():
    model, processor = tiny_llava(), tiny_processor()
    return Chat(attach(model, processor, BUDGET), processor, max_new_tokens=6)


@pytest.fixture
def encoded(chat, monkeypatch):
    """How many images went through the encoder, call by call."""
    seen = []
    tower = chat.model.model.vision_tower.embeddings
    tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def anew(chat):
    """The last answer, from the whole conversation at once without any cache."""
    row = prompt_inputs(usual_template(chat.processor), chat.messages[:-1], chat.images)
    inputs = batch_prompts(chat.processor, [row])
    with torch.no_grad():
        output = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False, suppress_tokens=[4])
    ids = output[0, inputs["input_ids"].shape[1] :]
    return chat.processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_turns_reuse_the_cache_and_answer_as_if_computed_anew(chat, encoded):
    chat.show(make_image(0))
    first = chat.ask("what is this")
    assert (first.text, encoded) == (anew(chat), [1, 1])  # once by the chat, once by the check
    assert first.images == [(8, 16)]
    assert first.prefilled == first.prompt == 1 + SYSTEM + 1 + 8 + 3 + 1
    encoded.clear()

    second = chat.ask("is this red")
    assert encoded == []  # no image was read again
    assert second.text == anew(chat)
    assert (second.images, second.encoded) == ([], 0)
    assert second.prefilled < second.prompt - 8
    encoded.clear()

    chat.show(make_image(1))
    chat.show(make_image(2))
    third = chat.ask("how many")
    assert encoded == [2]  # the new ones only
    assert third.text == anew(chat)
    assert third.images == [(8, 16), (8, 16)]
    assert third.prompt - third.prefilled >= second.prompt  # all that was there before
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 3


def test_text_arrives_as_it_is_made(chat):
    pieces = []
    turn = chat.ask("how many", pieces.append)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == turn.text
    assert 0 < turn.first <= turn.seconds
    assert turn.tokens == 6


def test_a_question_without_any_image(chat):
    assert chat.ask("what is a circle").text == anew(chat)


def test_another_budget_keeps_the_conversation(chat, encoded):
    chat.show(make_image(0))
    chat.ask("what is this")
    encoded.clear()
    chat.budget(ZipConfig(dominant=9, contextual=2))
    turn = chat.ask("is this red")
    assert encoded == [1]
    assert turn.encoded == 1
    assert turn.prefilled == turn.prompt
    assert turn.text == anew(chat)
    chat.show(make_image(1))
    assert chat.ask("what").images == [(11, 16)]
    chat.budget(None)
    assert attached(chat.model) is None
    chat.show(make_image(2))
    turn = chat.ask("what")
    assert turn.images == [(16, 16)]
    assert turn.text == anew(chat)
    chat.budget(BUDGET)
    assert chat.ask("what").encoded == 3


def test_a_budget_that_can_not_be_met_changes_nothing(chat):
    chat.show(make_image(0))
    chat.ask("what is this")
    with pytest.raises(ValueError, match="can't be met"):
        chat.budget(ZipConfig(dominant=50))
    assert chat.config == attached(chat.model).config == BUDGET
    assert chat.ask("what").encoded == 0


def test_reset(chat):
    chat.show(make_image(0))
    chat.ask("what is this")
    chat.show(make_image(1))
    chat.reset()
    turn = chat.ask("what")
    assert (turn.prompt, turn.encoded, len(chat.messages)) == (4 + SYSTEM, 0, 2)


def test_an_interrupted_answer(chat):
    chat.show(make_image(0))
    said = []

    def stop(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("what is this", stop)
    assert chat.messages[-1].text == "".join(said).strip()
    turn = chat.ask("is this red")
    assert turn.text == anew(chat)
    assert turn.encoded == 1


def test_a_conversation_that_gets_too_long(chat):
    before = len(chat.messages)
    with pytest.raises(ValueError, match=r"has 6\d\d tokens, and the model's limit is 512: /reset"):
        chat.ask("what " * 600)
    assert len(chat.messages) == before


def test_placeholders_in_a_question(chat):
    with pytest.raises(ValueError, match="<image> stands for an image and can't be part of a question"):
        chat.ask("what is <image>")
    assert chat.messages == []


def test_needs_something_attached(chat):
    with pytest.raises(ValueError, match="nothing is attached"):
        Chat(detach(chat.model), chat.processor)


class TestTerminal:
    @pytest.fixture
    def talk(self, tmp_path, monkeypatch, capsys):
        tiny_llava().save_pretrained(tmp_path / "base")
        tiny_processor().save_pretrained(tmp_path / "base")
        make_image(0).save(tmp_path / "a.png")
        monkeypatch.chdir(tmp_path)

        def run(*lines, arguments=(), budget=("--dominant", "5", "--contextual", "3")):
            import io

            monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
            code = main(["chat", "base", *budget, "--max-new-tokens", "4", *arguments])
            return code, capsys.readouterr()

        return run

    def test_a_transcript(self, talk):
        code, printed = talk("what is this", "/budget 12", "what", "/reset", "how many", arguments=["--image", "a.png"])
        assert code == 0
        assert "8 visual tokens (5 dominant + 3 contextual) per image. /help says" in printed.out
        assert f"image: 8 of 16 tokens · prompt {14 + SYSTEM} tokens · first token after" in printed.out
        assert (
            "12 visual tokens (10 dominant + 2 contextual) per image; the images so far are encoded again."
            in printed.out
        )
        assert "images encoded again: 1" in printed.out
        assert "Conversation and images forgotten." in printed.out

    def test_questions_on_the_command_line(self, talk):
        code, printed = talk("never read", arguments=["--image", "a.png", "--ask", "what is this", "--ask", "how many"])
        assert code == 0
        first, second = [line for line in printed.out.splitlines() if "first token after" in line]
        assert first.startswith("image: 8 of 16 tokens · ")
        assert "from the cache" in second
        assert "never read" not in printed.out
        assert "/help" not in printed.out

    def test_all_tokens(self, talk):
        code, printed = talk("what", "/budget 8", "what", arguments=["--image", "a.png"], budget=("--budget", "all"))
        assert code == 0
        assert "all visual tokens. /help says" in printed.out
        assert f"image: 16 of 16 tokens · prompt {20 + SYSTEM} tokens" in printed.out
        assert (
            "8 visual tokens (7 dominant + 1 contextual) per image; the images so far are encoded again." in printed.out
        )
        assert "images encoded again: 1" in printed.out

    def test_mistakes_do_not_end_it(self, talk, tmp_path):
        (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
        Image.new("CMYK", (20, 20)).save(tmp_path / "cmyk.jpg")
        code, printed = talk(
            "/image", "/image nope.png", "/image broken.jpg", '/image "', "/budget", "/wrong", "/image cmyk.jpg", "what"
        )
        assert code == 0
        wrong = [line for line in printed.out.splitlines() if line.startswith("! ")]
        expected = ["/image takes one or more", "nope.png: file missing (No such file or directory)", "broken.jpg: unreadable image", "No closing quotation",
                    "/budget takes one value", "/wrong is not a command"]  # fmt: skip
        assert len(wrong) == len(expected)
        for line, part in zip(wrong, expected, strict=True):
            assert part in line
        assert "image: 8 of 16 tokens" in printed.out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-new-tokens", "0"], "argument --max-new-tokens: must be at least 1, found 0"),
            (["--temperature", "-1"], "argument --temperature: expected a number of at least 0, got '-1'"),
            (
                ["--dominant", "x"],
                "argument --dominant: expected a number of tokens (54) or a share of them (0.1), got 'x'",
            ),
        ],
    )
    def test_numbers_that_make_no_sense(self, talk, capsys, arguments, message):
        with pytest.raises(SystemExit):
            talk(arguments=arguments)
        assert message in capsys.readouterr().err

    def test_a_budget_that_is_none_is_one_line(self, talk):
        code, printed = talk(arguments=["--dominant", "2.5"])
        assert (code, len(printed.err.splitlines())) == (2, 1)
        assert printed.err.startswith("visionzip chat: dominant=2.5 is not a share of the tokens")

    def test_the_memory_does_not_suffice(self, talk, monkeypatch):
        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Chat, "ask", full)
        code, printed = talk("what", "/reset")
        assert code == 0
        assert "! there is not enough memory for this conversation; try /reset, or a smaller /budget" in printed.out
        assert "forgotten" in printed.out

    def test_a_wrong_image_ends_it_before_the_model_is_loaded(self, talk, monkeypatch):
        monkeypatch.setattr("visionzip.load", None)
        code, printed = talk(arguments=["--image", "nope.png"])
        assert (code, printed.err) == (2, "visionzip chat: nope.png: file missing (No such file or directory)\n")


def test_a_cache_that_ends_inside_an_image_is_used_up_to_the_image(chat):
    ids = torch.tensor([0, 5, *[4] * 8, 7, *[4] * 8, 8, 6])
    for held, expected in (
        (5, (2, 0)),
        (2, (2, 0)),
        (10, (10, 1)),
        (14, (11, 1)),
        (19, (19, 2)),
        (21, (20, 2)),
        (1, (1, 0)),
    ):
        chat._held = ids[:held]
        assert chat._common(ids, [8, 8]) == expected
    assert chat._common(ids, [8, 9]) == (0, 0)  # counts that do not fit the prompt
