"""A byte-level BPE tokenizer trained on a few lines, in the ordinary format, with and without a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = ["What is two plus two?", "It is four.", "The answer to the question is four, and not five."]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<turn>", "</turn>"]
TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}: {{ message['content'] }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}{% if enable_thinking is false %}()</turn>{% endif %}"
)


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """300 ids; id 2 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    tiny_tokenizer(chat=chat).save_pretrained(folder)
