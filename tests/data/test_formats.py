"""Each layout of a record becomes the same Sample, and what is not one is refused by name."""

from __future__ import annotations

import base64

import pytest

from data.config import Columns, DataConfig, SourceConfig
from data.formats import list_formats, parse_record
from data.formats.common import RecordSource
from data.sample import Media, Message, Reject, Sample, Slot

ROOT = "/images"
A, B = Media("image", "/images/a.jpg"), Media("image", "/images/b.jpg")


def read(row, layout: str = "auto", **columns: str) -> Sample:
    return parse_record(row, RecordSource("here", layout, ROOT, Columns(**columns)), 7)


def llava(*turns: str, **more):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)], **more}


EXPECTED = [Message("user", [Slot("image", 0), "\nWhat?"]), Message("assistant", ["A cat."])]
SAME = {
    "llava": llava("<image>\nWhat?", "A cat.", image="a.jpg"),
    "llava, a list": llava("<image>\nWhat?", "A cat.", image=["a.jpg"]),
    "llava, no marker": llava("What?", "A cat.", image="a.jpg"),
    "sharegpt": {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
        "images": ["a.jpg"],
    },
    "conversations with roles": {
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}],
        "image": "a.jpg",
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
    },
    "parts, images beside": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": ["a.jpg"],
    },
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "\nWhat?"}],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "cauldron": {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"}]},
    "question and answer": {"question": "What?", "answer": "A cat.", "image": "a.jpg"},
    "several answers": {"question": "What?", "answers": ["A cat.", "cat"], "image": "a.jpg"},
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME.keys())
def test_every_layout_gives_the_same_sample(row):
    sample = read(row)
    assert sample.messages == EXPECTED
    assert sample.media == [A]
    assert (sample.source, sample.id) == ("here", "#7")


def test_a_caption_has_an_image_and_no_question():
    assert read({"image": "a.jpg", "caption": "A cat."}).messages == [
        Message("user", [Slot("image", 0)]),
        Message("assistant", ["A cat."]),
    ]


def test_ids_and_types():
    sample = read(llava("a", "b", "c", "d", id=12, types=["colour", "count"]))
    assert (sample.id, sample.types) == ("12", ["colour", "count"])
    assert read({"question": "a", "answer": "b", "question_type": "yes/no"}).types == ["yes/no"]


def test_columns_can_be_mapped_into_nested_records():
    row = {"meta": {"key": "k9"}, "pic": "a.jpg", "q": "What?", "reply": "A cat."}
    sample = read(row, id="meta.key", image="pic", question="q", answer="reply")
    assert (sample.id, sample.messages, sample.media) == ("k9", EXPECTED, [A])
    with pytest.raises(Reject, match="no column 'photo'"):
        read(row, image="photo", question="q", answer="reply")


def test_markers_anywhere_in_several_turns():
    sample = read(llava("Is <image> like <image>?", "No.", "And <image>", "Yes.", image=["a.jpg", "b.jpg", "c.jpg"]))
    assert sample.messages[0].parts == ["Is ", Slot("image", 0), " like ", Slot("image", 1), "?"]
    assert sample.messages[2].parts == ["And ", Slot("image", 2)]
    assert [media.source for media in sample.media] == ["/images/a.jpg", "/images/b.jpg", "/images/c.jpg"]


def test_a_marker_in_an_answer_is_text():
    sample = read(llava("How do I show an image in HTML?", "With <image> in SVG, <img> in HTML."))
    assert sample.messages[1].parts == ["With <image> in SVG, <img> in HTML."]
    assert sample.media == []


def test_videos_take_either_marker():
    for marker in ("<video>", "<image>"):
        sample = read(llava(f"{marker}\nWhat happens?", "He falls.", video="a.mp4"))
        assert sample.messages[0].parts[0] == Slot("video", 0)
        assert sample.media == [Media("video", "/images/a.mp4")]
    both = read(llava("<video> or <image>?", "B", image="a.jpg", video="a.mp4"))
    assert [media.kind for media in both.media] == ["video", "image"]
    assert both.messages[0].slots == [Slot("video", 0), Slot("image", 1)]


def test_embedded_images_and_data_uris():
    embedded = {"bytes": b"\x89PNG", "path": "a.png"}
    assert read(llava("<image>\nWhat?", "A", image=embedded)).media == [Media("image", b"\x89PNG")]
    assert read(llava("<image>\nWhat?", "A", image={"bytes": None, "path": "a.jpg"})).media == [A]
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert read(llava("<image>\nWhat?", "A", image=uri)).media == [Media("image", b"\x89PNG")]


def test_a_greeting_before_the_first_question_is_skipped_as_llava_does():
    row = {"conversations": [{"from": "gpt", "value": "Hello"}, *llava("a", "b")["conversations"]]}
    assert [message.text for message in read(row).messages] == ["a", "b"]


def test_a_last_question_without_an_answer_is_left_out_with_its_image():
    sample = read(llava("<image>\nWhat?", "A cat.", "And <image>?", image=["a.jpg", "b.jpg"]))
    assert sample.messages == EXPECTED
    assert sample.media == [A]


def test_a_system_message_comes_first():
    row = {"messages": [{"role": "system", "content": "Be kind."}, *SAME["sharegpt"]["messages"]], "images": ["a.jpg"]}
    assert [message.role for message in read(row).messages] == ["system", "user", "assistant"]


def role(name: str, text: str = "x"):
    return {"from": name, "value": text}


BAD = {
    "wrong type": [
        "text",
        None,
        17,
        {"conversations": ["a"]},
        {"conversations": [{"from": "human"}]},
        llava(5, "b"),
        llava("a", None),
        llava("<image>", "b", image=5),
        llava("<image>", "b", image=[["a.jpg"]]),
        llava("<image>", "b", image="a\0.jpg"),
        llava("a", "b", types=[1]),
        llava("a", "b", "c", "d", types=["one"]),
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
        {"texts": [{"user": "a"}]},
        {"question": 5, "answer": "b"},
    ],
    "unknown layout": [{}, {"a": 1}, {"conversations": "a"}],
    "unknown role": [{"conversations": [role("tool"), role("gpt")]}, {"conversations": [role(5)]}],
    "empty conversation": [{"conversations": []}, {"messages": []}, {"texts": [], "images": []}],
    "turn order": [
        {"conversations": [role("human"), role("human"), role("gpt")]},
        {"conversations": [role("human"), role("gpt"), role("gpt")]},
        {"conversations": [role("gpt"), role("gpt"), role("human")]},
        {"conversations": [role("human"), role("system"), role("gpt")]},
    ],
    "no answer": [
        llava("a"),
        {"conversations": [role("gpt")]},
        {"conversations": [role("system")]},
        {"question": "a", "answer": None},
    ],
    "empty answer": [llava("a", ""), llava("a", " \n"), llava("a", "b", "c", ""), {"question": "a", "answers": []}],
    "empty question": [llava("", "b"), llava(" ", "b")],
    "image count": [
        llava("<image>", "b"),
        llava("<image> <image>", "b", image="a.jpg"),
        llava("<image>", "b", image=["a.jpg", "b.jpg"]),
        llava("<image>", "b", image=""),
        llava("<video> <video>", "b", image="a.jpg", video="a.mp4"),
    ],
    "misplaced image": [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "image", "path": "a.jpg"}]},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "<image>"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ],
            "images": ["a.jpg"],
        },
    ],
    "path outside the image root": [
        llava("<image>", "b", image=path)
        for path in ("../a.jpg", "x/../../a.jpg", "/etc/passwd", "/images2/a.jpg", "..")
    ],
    "remote image": [
        llava("<image>", "b", image="https://example.org/a.jpg"),
        llava("<image>", "b", image="file:///a"),
    ],
    "unreadable image": [llava("<image>", "b", image="data:image/png;base64,!!!")],
}
CASES = [(reason, row) for reason, rows in BAD.items() for row in rows]


@pytest.mark.parametrize(("reason", "row"), CASES, ids=[f"{reason} {n}" for n, (reason, _) in enumerate(CASES)])
def test_what_is_refused_and_why(reason, row):
    with pytest.raises(Reject) as caught:
        read(row)
    assert caught.value.reason == reason


def test_paths_inside_the_root_in_any_spelling():
    for path in ("a.jpg", "./a.jpg", "x/../a.jpg", "/images/a.jpg"):
        assert read(llava("<image>\nWhat?", "A", image=path)).media == [A]


def test_a_layout_is_found_by_its_file_and_others_are_named():
    assert list_formats() == ["cauldron", "llava", "messages", "qa"]
    with pytest.raises(ValueError, match="there is no format 'lava'; there are auto, cauldron, llava"):
        SourceConfig(path="a.json", format="lava")


def test_the_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"(?s)sources\.0\.fractions.*template"):
        DataConfig.model_validate({"sources": [{"path": "a.json", "fractions": 0.1}], "template": "vicuna"})
    with pytest.raises(ValueError, match="both called 'a'"):
        DataConfig.model_validate({"sources": [{"path": "x/a.json"}, {"path": "y/a.json"}]})
    with pytest.raises(ValueError, match="sources"):
        DataConfig.model_validate({"sources": []})
