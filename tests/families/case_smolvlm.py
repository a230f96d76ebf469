"""SmolVLM: Idefics3 with a pixel shuffle by 3, down to 81 tokens a tile."""

from __future__ import annotations

from typing import Any

from tests.families.case import tokenizer
from tests.families.case_idefics3 import SPECIAL, Idefics3Case


def without_video(kind: type) -> type:
    """The processor class without its video processor and num2words, which are not installed here."""

    class Processor(kind):  # type: ignore[misc,valid-type]
        def __init__(self, image_processor: Any, tokenizer: Any, image_seq_len: int, chat_template: Any = None) -> None:
            from transformers.processing_utils import ProcessorMixin

            names = ("image_token", "fake_image_token", "end_of_utterance_token", "global_image_token")
            for name, token in zip(names, SPECIAL, strict=True):
                setattr(self, name, token)
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.image_seq_len = image_seq_len
            self.video_token = "<video>"
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    Processor.__name__ = kind.__name__
    return Processor


class SmolVLMCase(Idefics3Case):
    name = "SmolVLM"
    needs_transformers = "5.20"
    model_class = "SmolVLMForConditionalGeneration"
    checkpoints = ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    special = "as Idefics3; 81 or 64 tokens per tile before selection; a video is tiles"
    fixture = "smolvlm2_2_2b"
    per_tile = 81
    nested = True
    needs_torchvision = True
    exempt = {"video": "the untouched model treats frames as tiles of images, and they are compressed as such"}  # noqa: RUF012

    def processor(self) -> Any:
        from transformers import SmolVLMImageProcessor, SmolVLMProcessor

        images = SmolVLMImageProcessor(**self.settings())
        return without_video(SmolVLMProcessor)(images, tokenizer(*SPECIAL), image_seq_len=self.per_tile)


CASE = SmolVLMCase()
