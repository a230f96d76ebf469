"""What the embedded model is made of: tokenizer, processor, chat template, configuration. Trained by `scripts/make_tiny_llava.py`."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data import shapes

PATCH = 8
WIDTH = 96
VOCABULARY = 1024
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")  # the first three at the places Llama has them
UNK, BOS, EOS, PAD, IMAGE = range(5)
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# LLaVA-1.5's prompt, with the end token after an answer that training needs; what is supervised stands in `generation`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ ' ' + part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ 'USER: ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The tokenizer of data/tiny-llava was trained on these words: other words make another tokenizer.
ENGLISH = """
The quick brown fox jumps over the lazy dog. There is nothing in this picture that I can not describe, but I am not sure what you mean.
Please describe the image in detail. What is shown here, and why would anyone want to look at it? Answer the question using a single word or phrase.
Answer with the option's letter from the given choices directly. Provide a one-sentence caption for the provided image. Can you tell me more about it?
It was a bright cold day, and the people in the street were walking home from their work. Some of them had bought bread, others carried books.
We have seen that large models are slow when they have to read many tokens, because every token is compared with all the others. Most of these tokens
say the same thing twice. When only the most important ones are kept, the answer is nearly the same, and it comes in a fraction of the time.
How are you today? I am fine, thank you. Where do you come from? This is the first time that we meet, isn't it? They don't know what they're doing.
Numbers such as 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 64, 100, 128 and 1000 are common; so are dates like 2023 or 2024, and percentages like 50%.
On the left side of the table stands a small white cup; behind it, to the right, a large green plant. The man with the black hat is holding an umbrella.
Does the child look happy? Yes, it does. No, it does not. Maybe. Is the sign red or yellow? Which animal is in front of the house, a cat or a horse?
The water under the bridge is deep, the mountains in the background are covered with snow, and the sky above the city is grey with heavy clouds.
"""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text survives encoding and decoding, and the words of the data set are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _corpus(seed: int) -> Iterator[str]:
    yield from ENGLISH.split("\n") * 20
    yield from [SYSTEM, " USER: ASSISTANT:"] * 200
    for index in range(2000):
        made = shapes.make_scene(shapes.image_seed("train", seed, index))
        for asked in shapes.conversation(made):
            yield f"USER:\n{asked.question} ASSISTANT: {asked.answer}"
            yield f"USER: {asked.question} ASSISTANT: {asked.answer}"


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    edge = {"height": shapes.SIZE, "width": shapes.SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": shapes.SIZE}, crop_size=edge),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=shapes.SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(shapes.SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, PAD
    model = LlavaForConditionalGeneration(config)
    # transformers' standard deviation of 0.02 is meant for far wider models: with it, nothing is learnt for long.
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        for weight in part.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.08)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=32, do_sample=False
    )
    return model
