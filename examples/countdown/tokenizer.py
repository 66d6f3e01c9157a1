"""A 64-token tokenizer for Countdown: every number 0..49 is one token, saved in the ordinary fast-tokenizer format.

Teacher and student share id -> token bytes. They differ as the paper's pair does: the student is a "base" model
without a chat template that ends with ``<|endoftext|>``; the teacher has a template and also ends turns with
``<|im_end|>``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eopd.examples.countdown.task import OPERATIONS, Traces

PAD, END, UNKNOWN, TURN_START, TURN_END = "<pad>", "<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, END, UNKNOWN, TURN_START, TURN_END)
WORDS = ("user", "assistant", "\n", ",", "=", ":", *OPERATIONS)
MAX_NUMBER = 49
VOCABULARY = (*SPECIAL, *WORDS, *map(str, range(MAX_NUMBER + 1)))
ID = {token: index for index, token in enumerate(VOCABULARY)}
assert len(VOCABULARY) == 64

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_PREFIX = (TURN_START, "user", "\n")
CHAT_SUFFIX = (TURN_END, "\n", TURN_START, "assistant", "\n")


def build(*, chat: bool) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer (``chat``) or the student's."""
    tokenizer = Tokenizer(models.WordLevel(dict(ID), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[a-z]+|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END if chat else END,
        unk_token=UNKNOWN,
        additional_special_tokens=[END, TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(traces: Traces, *, chat: bool) -> tuple[NDArray[np.int64], int]:
    """Token ids [N, L] of prompt, solution and stop token, and how many of them are the prompt.

    The same ids as ``build(chat).encode`` of the texts, but vectorised: all rows have the same length.
    """
    count, n = traces.numbers.shape
    zero = ID["0"]

    def column(token: str) -> NDArray[np.int64]:
        return np.full((count, 1), ID[token], dtype=np.int64)

    prompt = [column(token) for token in CHAT_PREFIX] if chat else []
    for k in range(n):
        prompt += [traces.numbers[:, k : k + 1] + zero, column("," if k < n - 1 else "=")]
    prompt += [traces.target[:, None] + zero, column(":")]
    if chat:
        prompt += [column(token) for token in CHAT_SUFFIX]
    response = []
    for k in range(n - 1):
        a, op, b, c = (traces.steps[:, k, part : part + 1] for part in range(4))
        response += [a + zero, op + ID[OPERATIONS[0]], b + zero, column("="), c + zero]
        response.append(column(",") if k < n - 2 else column(TURN_END if chat else END))
    return np.concatenate(prompt + response, axis=1), len(prompt)
