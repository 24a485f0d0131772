"""Conversations as token ids, with a mask of the tokens that the assistant writes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from laconic.checkpoint.files import first_line
from laconic.data.text import bos_prefix, message_text, read_rows, templated

MaskedTokens = tuple[list[int], list[bool]]
"""Token ids, and the loss mask: whether each is to be learned."""


def read_conversations(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    config: str | None = None,
    answers_only: bool = True,
) -> Iterator[MaskedTokens]:
    """Tokenize the conversations of a dataset, by the tokenizer's chat template where it has one.

    Args:
        dataset: File or Hub name; rows have `messages` (role, content), or `instruction`, `output` and perhaps `input`.
        tokenizer: The tokenizer.
        split: Split of a Hub dataset.
        config: Configuration of a Hub dataset.
        answers_only: Whether the loss mask covers only the assistant's messages and their end; otherwise every token.

    Yields:
        Token ids and loss mask of each conversation.

    Raises:
        ValueError: Rows have other columns, or the chat template rejects a conversation.
    """
    for row, where in read_rows(dataset, split=split, config=config):
        messages = _messages(row, where)
        ids, loss_mask = _templated(messages, tokenizer) if tokenizer.chat_template else _plain(messages, tokenizer)
        yield ids, loss_mask if answers_only else [True] * len(ids)


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    if isinstance(row, dict):
        messages = row.get("messages")
        if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            messages = [m | {"content": message_text(m.get("content"), where)} for m in messages]
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
            return [{"role": m["role"], "content": m["content"]} for m in messages]
        instruction, context, answer = (row.get(k) or "" for k in ("instruction", "input", "output"))
        if all(isinstance(s, str) for s in (instruction, context, answer)) and instruction and answer:
            question = f"{instruction}\n\n{context}" if context else instruction
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise ValueError(
        f"{where} has neither 'messages' of role and content nor an 'instruction' with its 'output'; "
        "for plain text set format: text"
    )


def _is_message(m: Any) -> bool:
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)


def _plain(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> MaskedTokens:
    """Tokenize `role: content` lines, as calibration does; an answer ends with EOS.

    Question and answer are tokenized separately, so that no token belongs to both.
    """
    ids = bos_prefix(tokenizer)
    loss_mask = [False] * len(ids)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for message in messages:
        by_assistant = message["role"] == "assistant"
        pieces = [(f"{message['role']}: ", False), (message["content"] + ("" if by_assistant else "\n"), by_assistant)]
        for text, answer in pieces:
            tokens = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            tokens += eos if answer else []
            ids += tokens
            loss_mask += [answer] * len(tokens)
    return ids, loss_mask


def _templated(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> MaskedTokens:
    """Tokenize a chat by the chat template.

    An answer is what an assistant's message adds to the tokens of the chat before it, as far as these tokens are the
    same in the whole chat.
    """

    def template(chat: list[dict[str, str]], prompt: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            templated(tokenizer, chat), tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        return list(encoded["input_ids"])

    try:
        ids = template(messages, False)
        loss_mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _common_length(ids, template(messages[:i], True)) if i else 0
                stop = _common_length(ids, template(messages[: i + 1], False))
                loss_mask[start:stop] = [True] * (stop - start)
    except Exception as e:
        raise ValueError(f"a chat of the dataset does not fit the model's chat template: {first_line(e)}") from e
    return ids, loss_mask


def _common_length(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
