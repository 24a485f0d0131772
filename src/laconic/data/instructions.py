"""Instructions with their answers as token ids, and which of the tokens are answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from laconic.checkpoint.files import first_line
from laconic.data.text import bos_prefix, read_rows

MaskedTokens = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is to be learnt."""


def read_conversations(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    config: str | None = None,
    answers_only: bool = True,
) -> Iterator[MaskedTokens]:
    """Conversations of a dataset, through the tokenizer's chat template where it has one.

    dataset: rows with `messages` (role, content), or with `instruction`, `output` and perhaps `input`. answers_only:
    learn what the assistant says, and that it ends there; otherwise everything.
    Raises: ValueError for rows of another kind, and chats that the template refuses.
    """
    for row, where in read_rows(dataset, split=split, config=config):
        messages = _messages(row, where)
        ids, loss_mask = _templated(messages, tokenizer) if tokenizer.chat_template else _plain(messages, tokenizer)
        yield ids, loss_mask if answers_only else [True] * len(ids)


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    if isinstance(row, dict):
        given = row.get("messages")
        if isinstance(given, list) and given and all(_is_message(m) for m in given):
            return [{"role": m["role"], "content": m["content"]} for m in given]
        asked, context, answer = (row.get(k) or "" for k in ("instruction", "input", "output"))
        if all(isinstance(s, str) for s in (asked, context, answer)) and asked and answer:
            question = f"{asked}\n\n{context}" if context else asked
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise ValueError(
        f"{where} has neither 'messages' of role and content nor an 'instruction' with its 'output'; "
        "for plain text set format: text"
    )


def _is_message(m: Any) -> bool:
    return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)


def _plain(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> MaskedTokens:
    """`role: content`, a line each, as calibration has them; an answer ends with EOS. Question and answer are encoded
    apart, so that no token belongs to both."""
    ids = bos_prefix(tokenizer)
    loss_mask = [False] * len(ids)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for message in messages:
        own = message["role"] == "assistant"
        said = [(f"{message['role']}: ", False), (message["content"] + ("" if own else "\n"), own)]
        for text, answer in said:
            piece = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            piece += eos if answer else []
            ids += piece
            loss_mask += [answer] * len(piece)
    return ids, loss_mask


def _templated(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> MaskedTokens:
    """The whole chat by the template. An answer is what an assistant's message adds to the chat before it, as far as
    the template writes the same again when the chat goes on."""

    def filled(part: list[dict[str, str]], prompt: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            part, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        return list(encoded["input_ids"])

    try:
        whole = filled(messages, False)
        loss_mask = [False] * len(whole)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _common(whole, filled(messages[:i], True)) if i else 0
                stop = _common(whole, filled(messages[: i + 1], False))
                loss_mask[start:stop] = [True] * (stop - start)
    except Exception as e:
        raise ValueError(f"a chat of the dataset does not fit the model's chat template: {first_line(e)}") from e
    return whole, loss_mask


def _common(a: list[int], b: list[int]) -> int:
    """Length of what two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
