"""Calibration and evaluation text: every kind of file gives the same windows, and a bad one is named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.checkpoint.source import load_tokenizer
from laconic.data.text import calibration_windows, encode, evaluation_windows, read_documents
from tiny import make_text

TEXT = make_text(400)
CHAT = [{"role": "user", "content": TEXT[:200]}, {"role": "assistant", "content": TEXT[200:]}]
BOS = 0


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(llama)


def write(file: Path, rows: Iterable[Any]) -> Path:
    """Rows as a file of the kind its name says."""
    match file.suffix:
        case ".txt":
            file.write_text("".join(rows))
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def windows(file: Path, tokenizer: PreTrainedTokenizerBase, *, samples: int = 8, length: int = 32) -> Tensor:
    return calibration_windows(read_documents(str(file)), tokenizer, samples=samples, length=length, seed=0)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", [{"text": TEXT}]),
        ("a.jsonl", [{"text": TEXT[:123]}, {"text": TEXT[123:]}]),
        ("a.parquet", [{"text": TEXT}]),
        ("a.parquet", [{"text": TEXT[:123], "id": 1}, {"text": TEXT[123:], "id": 2}]),
    ],
)
def test_the_same_text_gives_the_same_windows_from_any_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, rows: list[Any]
) -> None:
    plain = windows(write(tmp_path / "a.txt", [TEXT]), tokenizer)
    assert windows(write(tmp_path / name, rows), tokenizer).equal(plain)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_chat_is_its_template_filled_in(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str, template: str | None
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    filled = "\n".join(f"{turn['role']}: {turn['content']}" for turn in CHAT)
    plain = windows(write(tmp_path / "a.txt", [filled]), tokenizer)
    assert windows(write(tmp_path / name, [{"messages": CHAT}]), tokenizer).equal(plain)


def parts(message: dict[str, str]) -> dict[str, Any]:
    half = len(message["content"]) // 2
    return message | {
        "content": [{"type": "text", "text": t} for t in (message["content"][:half], message["content"][half:])]
    }


# One template reads strings alone, the other parts alone.
STRINGS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m.role }}: "
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{{ '\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, STRINGS, PARTS], ids=["none", "strings", "parts"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "in-parts"])
def test_content_in_parts_is_the_text_of_its_parts(
    template: str | None,
    split: bool,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = [parts(m) for m in CHAT] if split else CHAT
    file = write(tmp_path / "chat.jsonl", [{"messages": chat}])
    (document,) = read_documents(str(file))
    expected = "".join(f"{m['role']}: {m['content']}\n" for m in CHAT)
    ids = encode(tokenizer, document)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == expected.strip()


def test_content_that_is_no_text_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
    with pytest.raises(ValueError, match=r"line 1, has a message with a part of type 'image'; keep only rows of text"):
        list(read_documents(str(file)))


def test_a_chat_that_the_template_refuses_is_told(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="does not fit the model's chat template: roles must alternate"):
        calibration_windows([CHAT], tokenizer, samples=1, length=8, seed=0)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = write(tmp_path / "a.txt", [TEXT])
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert windows(marked, tokenizer).equal(windows(plain, tokenizer))


@given(
    documents=st.lists(st.text("abc ", max_size=40), min_size=1, max_size=6).filter(lambda d: len("".join(d)) >= 20),
    samples=st.integers(1, 8),
    length=st.integers(2, 12),
    seed=st.integers(0, 3),
)
def test_windows_are_pieces_of_the_text_each_led_by_one_bos(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], samples: int, length: int, seed: int
) -> None:
    made = calibration_windows(documents, tokenizer, samples=samples, length=length, seed=seed)
    assert made.dtype == torch.int64
    assert made.shape[1] == length
    assert 1 <= len(made) <= samples
    text = "".join(documents)
    pieces = [text[i : i + length - 1] for i in range(0, len(text), length - 1)]
    assert {tokenizer.decode(w[1:]) for w in made} <= set(pieces)
    assert ((made == BOS).sum(1) == 1).all()
    assert (made[:, 0] == BOS).all()


def test_a_seed_chooses_other_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = [calibration_windows([TEXT], tokenizer, samples=4, length=11, seed=seed) for seed in (0, 0, 1)]
    assert chosen[0].equal(chosen[1])
    assert not chosen[0].equal(chosen[2])


def test_a_long_dataset_is_not_read_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    def endless() -> Iterable[str]:
        for _ in range(100):
            yield TEXT
        raise AssertionError("read on")

    assert len(calibration_windows(endless(), tokenizer, samples=8, length=32, seed=0)) == 8


def test_evaluation_takes_the_text_in_order_and_once(tokenizer: PreTrainedTokenizerBase) -> None:
    made = evaluation_windows([TEXT[:150], TEXT[150:]], tokenizer, length=32, limit=None)
    assert (made[:, 0] == BOS).all()
    assert tokenizer.decode(made[:, 1:].flatten()) == TEXT[: 12 * 31]
    assert evaluation_windows([TEXT], tokenizer, length=32, limit=2).equal(made[:2])


def test_text_of_a_chat_template_without_bos_loses_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    made = evaluation_windows([[{"role": "user", "content": "abcdef"}]], tokenizer, length=7, limit=None)
    assert tokenizer.decode(made[0]) == "<s>abcdef"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "{file} is not UTF-8 text (unexpected end of data at byte 3); convert it to UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "{file}, line 2, is not UTF-8 text ("),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }', "{file}, line 3, is not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 99999, "{file}, line 2, is not JSON: "),
        ("a.jsonl", b'{"content": "a"}', "{file}, line 1, has neither a 'text' string nor a list of 'messages'"),
        ("a.jsonl", b'{"text": null}', "{file}, line 1, has neither a 'text' string nor a list of 'messages'"),
        ("a.jsonl", b'{"messages": ["hello"]}', "{file}, line 1, has neither a 'text' string nor a list of 'messages'"),
        ("a.jsonl", b'"hello"', "{file}, line 1, has neither a 'text' string nor a list of 'messages'"),
        ("a.parquet", b"PAR1 no more PAR1", "{file} is not a readable Parquet file: "),
        ("a.parquet", b"", "{file} is not a readable Parquet file: "),
        (
            "a.csv",
            b"text\nhello\n",
            "'{file}' is no dataset: use a .txt, .jsonl, .json or .parquet file, or a Hub name",
        ),
        ("folder.txt/a.txt", b"", "no text file '{file.parent}'; check the path"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    asked = file if file.parent == tmp_path else file.parent
    with pytest.raises(ValueError, match=r"\S") as told:
        list(read_documents(str(asked)))
    assert str(told.value).startswith(expected.format(file=file))


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"label": 1}])
    with pytest.raises(ValueError, match=r"a\.parquet has neither a 'text' string nor a list of 'messages'"):
        list(read_documents(str(file)))


def test_a_parquet_file_damaged_inside_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"text": make_text(2000)}])
    damaged = bytearray(file.read_bytes())
    damaged[4:44] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file: "):
        list(read_documents(str(file)))


@pytest.mark.parametrize("text", ["", "a few words"])
def test_too_little_text_is_told(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    expected = f"the calibration text has {len(text)} tokens, less than one sample of 32"
    with pytest.raises(ValueError, match=expected):
        calibration_windows([text], tokenizer, samples=1, length=32, seed=0)
