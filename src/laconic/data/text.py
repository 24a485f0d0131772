"""Reading text datasets, and cutting them into windows of token ids for calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.checkpoint.files import first_line

# Datasets for perplexity, by their usual names.
HUB_TEXTS = {
    "wikitext2": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"},
    "c4": {"dataset": "allenai/c4", "config": "en", "split": "validation"},
}
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def read_documents(dataset: str, *, split: str = "train", config: str | None = None) -> Iterator[Any]:
    """Read the documents of a dataset.

    Args:
        dataset: A local .txt (one document), .jsonl, .json or .parquet file (column `text`, or chat `messages`), or a
            Hub name.
        split: Split of a Hub dataset.
        config: Configuration of a Hub dataset.

    Returns:
        An iterator over documents: each a string, or a list of chat messages.

    Raises:
        ValueError: The dataset cannot be read, or has neither column.
    """
    return (_document(row, where) for row, where in read_rows(dataset, split=split, config=config))


def read_rows(dataset: str, *, split: str = "train", config: str | None = None) -> Iterator[tuple[Any, str]]:
    """Read the rows of a dataset.

    Args:
        dataset: A local .txt file (one row with the whole `text`), .jsonl, .json (a list of rows) or .parquet file, or
            a Hub name.
        split: Split of a Hub dataset.
        config: Configuration of a Hub dataset.

    Returns:
        An iterator over rows, each with a description of its location for messages.

    Raises:
        ValueError: The dataset cannot be read.
    """
    path = Path(dataset).expanduser()
    if path.suffix in _SUFFIXES or path.exists():
        if not path.is_file():
            raise ValueError(f"no text file '{dataset}'; check the path")
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"'{dataset}' is no dataset: use a .txt, .jsonl, .json or .parquet file, or a Hub name")
        return _read_file(path)
    return _read_hub(dataset, split, config)


def _read_file(path: Path) -> Iterator[tuple[Any, str]]:
    if path.suffix == ".txt":
        yield {"text": _decode(path.read_bytes(), str(path))}, str(path)
    elif path.suffix == ".json":
        text = _decode(path.read_bytes(), str(path))
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not JSON: {e}") from e
        if not isinstance(rows, list):
            raise ValueError(f"{path} is no list of rows; write one row a line into a .jsonl file")
        for number, row in enumerate(rows, 1):
            yield row, f"{path}, row {number},"
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number},"
                if text := _decode(line, where).strip():
                    try:
                        row = json.loads(text)
                    except (ValueError, RecursionError) as e:
                        raise ValueError(f"{where} is not JSON: {e}") from e
                    yield row, where
    else:
        for row in _parquet_rows(path):
            yield row, str(path)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{where} is not UTF-8 text ({e.reason} at byte {e.start}); convert it to UTF-8") from e


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except Exception as e:
        raise ValueError(f"{path} is not a readable Parquet file: {first_line(e)}") from e


def _read_hub(name: str, split: str, config: str | None) -> Iterator[tuple[Any, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield row, name
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(
            f"dataset '{name}' is no local file and could not be fetched from the Hub ({first_line(e)}); "
            "name a local file, or go online"
        ) from e


def _document(row: Any, where: str) -> Any:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        messages = row.get("messages")
        if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            return [{**m, "content": message_text(m["content"], where)} if "content" in m else m for m in messages]
    raise ValueError(f"{where} has neither a 'text' string nor a list of 'messages'")


def message_text(content: Any, where: str) -> Any:
    """Return the content of a chat message as one string, if it comes in parts.

    Args:
        content: A string, or a list of parts, each a dict with a `type`; anything else is returned unchanged.
        where: Location of the message, for errors.

    Raises:
        ValueError: A part is no text.
    """
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a message with a part of type '{part['type']}'; keep only rows of text")
    return "".join(part["text"] for part in content)


def templated(tokenizer: PreTrainedTokenizerBase, messages: Any) -> Any:
    """Return chat messages in the form that a tokenizer's chat template reads.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Messages whose contents are strings.

    Returns:
        The messages; with contents in parts where the template leaves strings out, as those of some models with towers
        do.
    """
    probe = [{"role": "user", "content": "laconic"}]
    try:
        renders_strings = "laconic" in str(tokenizer.apply_chat_template(probe, tokenize=False))
    except Exception:
        return messages
    if renders_strings:
        return messages
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def encode(tokenizer: PreTrainedTokenizerBase, document: Any) -> list[int]:
    """Tokenize a document, with the special tokens (BOS) that the tokenizer adds itself.

    Args:
        tokenizer: The tokenizer.
        document: A string, or a list of chat messages; chats use the chat template if there is one.

    Returns:
        Token ids.

    Raises:
        ValueError: The chat template rejects the messages.
    """
    if isinstance(document, str):
        return list(tokenizer(document, verbose=False).input_ids)
    if tokenizer.chat_template:
        try:
            messages = templated(tokenizer, document)
            encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
            return list(encoded["input_ids"])
        except Exception as e:
            raise ValueError(f"a chat of the dataset does not fit the model's chat template: {first_line(e)}") from e
    turns = "\n".join(f"{m.get('role', 'user')}: {m.get('content', '')}" for m in document)
    return list(tokenizer(turns, verbose=False).input_ids)


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before every text: [BOS] for most, nothing for some.

    Args:
        tokenizer: The tokenizer.
    """
    ids = tokenizer("", verbose=False).input_ids
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def concatenate_tokens(
    documents: Iterable[Any], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[int]:
    """Concatenate the tokens of all documents, without the prefix of each.

    Args:
        documents: Strings or lists of chat messages.
        tokenizer: The tokenizer.
        prefix: Its `bos_prefix`; windows begin with it, not documents.

    Yields:
        Token ids.

    Raises:
        ValueError: The chat template rejects a document.
    """
    for document in documents:
        ids = encode(tokenizer, document)
        yield from ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids


def calibration_windows(
    documents: Iterable[Any], tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> Tensor:
    """Make calibration samples: concatenate documents, cut them into windows, and choose some at random.

    Each window begins with BOS where the tokenizer adds one.

    Args:
        documents: Strings or lists of chat messages.
        tokenizer: The tokenizer.
        samples: Number of windows to choose.
        length: Tokens of a window.
        seed: Seed of the choice.

    Returns:
        (n, length) int64, n <= samples.

    Raises:
        ValueError: The text is shorter than one window.
    """
    prefix = bos_prefix(tokenizer)
    body = length - len(prefix)
    # Four times the needed tokens are enough to choose from; a large dataset is not read to its end.
    stream = list(islice(concatenate_tokens(documents, tokenizer, prefix), 4 * samples * body))
    count = len(stream) // body
    if count < 1:
        raise ValueError(
            f"the calibration text has {len(stream)} tokens, less than one sample of {length}; "
            "give more text or lower calibration.max_seq_length"
        )
    windows = torch.tensor(stream[: count * body]).view(count, body)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    lead = torch.tensor(prefix, dtype=torch.long).expand(len(chosen), -1)
    return torch.cat([lead, windows[chosen]], dim=1)


def evaluation_windows(
    documents: Iterable[Any], tokenizer: PreTrainedTokenizerBase, *, length: int, limit: int | None
) -> Tensor:
    """Cut the concatenated documents into consecutive windows without overlap.

    Each window begins with BOS where the tokenizer adds one.

    Args:
        documents: Strings or lists of chat messages.
        tokenizer: The tokenizer.
        length: Tokens of a window.
        limit: Largest number of windows; None for all.

    Returns:
        (n, length) int64.

    Raises:
        ValueError: The text is shorter than one window.
    """
    prefix = bos_prefix(tokenizer)
    body = length - len(prefix)
    stream = list(concatenate_tokens(documents, tokenizer, prefix))
    count = len(stream) // body
    if count < 1:
        raise ValueError(
            f"the evaluation text has {len(stream)} tokens, less than one window of {length}; "
            "give more text or a shorter context (--context-length; --lengths of the long suite)"
        )
    windows = torch.tensor(stream[: count * body]).view(count, body)[:limit]
    lead = torch.tensor(prefix, dtype=torch.long).expand(len(windows), -1)
    return torch.cat([lead, windows], dim=1)
