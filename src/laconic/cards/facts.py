"""Contents of the cards that no other file of an artifact holds: `cards/facts.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard
from huggingface_hub.repocard import metadata_load
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.cards.language import language_mix
from laconic.cards.sets import TextSet, declared, filters_of, token_ids
from laconic.checkpoint.atomic import write_text
from laconic.checkpoint.source import Source

FOLDER, FACTS = "cards", "facts.json"
# Metadata that a card takes over from the card of the original.
_INHERITED = ("license", "license_name", "license_link", "language")


def read_facts(folder: Path) -> dict[str, Any]:
    """Read the facts of an artifact.

    Args:
        folder: Folder of the artifact.

    Returns:
        The facts; empty for an artifact without cards.

    Raises:
        ValueError: The file is not a facts file.
    """
    file = folder / FOLDER / FACTS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not valid JSON; delete it, and run 'laconic card {folder}'") from e
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is not a mapping of keys to values; delete it, and run 'laconic card {folder}'")
    return facts


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts of an artifact, atomically.

    Args:
        folder: Folder of the artifact, which exists.
        facts: The facts, as JSON values.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    write_text(folder / FOLDER / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def describe_base(source: Source) -> dict[str, Any]:
    """Describe the original model.

    Args:
        source: The original checkpoint.

    Returns:
        Name on the Hub (None for a local folder), display name, size of the weight files in bytes, dtype, name of a
        licence file, and the licence and languages of the model's own card.
    """
    inherited = {k: v for k, v in _metadata(source.folder / "README.md").items() if k in _INHERITED and v}
    return {
        "model": hub_id(source),
        "name": hub_id(source) or source.folder.resolve().name,
        "file_bytes": source.checkpoint.nbytes,
        "dtype": source.quantized or str(source.dtype).removeprefix("torch."),
        "license_file": next((f.name for f in sorted(source.folder.glob("LICENSE*"))), None),
        **inherited,
    }


def hub_id(source: Source) -> str | None:
    """Return the Hub name of a model that came from the Hub; None for a local folder.

    Args:
        source: The checkpoint.
    """
    for part in source.folder.resolve().parts[::-1]:
        # The Hub's cache: models--OWNER--NAME/snapshots/REVISION
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None if Path(source.name).expanduser().is_dir() else source.name


def describe_set(texts: TextSet, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe a text set: source, licence, filters, sizes, hashes and languages.

    Args:
        texts: The set.
        tokenizer: Tokenizer of the model.

    Returns:
        The facts of the set. If the set cannot be read, `unread` holds the reason, and sizes and hashes are missing.
    """
    spec = texts.spec
    file = Path(spec.dataset).expanduser()
    declarations = declared(texts)
    facts: dict[str, Any] = {
        "key": texts.key,
        "use": texts.use,
        "dataset": file.name if file.is_file() else spec.dataset,
        "on_hub": not file.is_file(),
        "config": spec.config,
        "split": None if file.is_file() else spec.split,
        **declarations,
        **_license(spec.dataset, file, declarations["license"]),
        "filters": filters_of(texts),
    }
    try:
        ids = token_ids(texts, tokenizer)
        facts["file"] = _file(file) if file.is_file() else None
    except (ValueError, OSError) as e:
        return facts | {"unread": " ".join(str(e).split())}
    pieces = decode(ids, tokenizer)
    return facts | {
        "sequences": len(ids),
        "tokens": sum(len(i) for i in ids),
        "text_bytes": sum(len(p.encode()) for p in pieces),
        "sha256": digest(ids),
        "languages": language_mix(pieces),
    }


def decode(ids: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode token sequences to text, without special tokens.

    Args:
        ids: Token ids (n,) of each sequence.
        tokenizer: Tokenizer of the model.

    Returns:
        One text per sequence.
    """
    return [str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids]


def digest(ids: Sequence[Tensor]) -> str:
    """Return the SHA-256 of token ids, as `recipe.yaml` of an artifact has it for the calibration set.

    Args:
        ids: Token ids (n,) int64 of each sequence, on the CPU; where the sequences are split does not matter.
    """
    sha256 = hashlib.sha256()
    for sequence in ids:
        sha256.update(sequence.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _license(dataset: str, file: Path, stated: str | None) -> dict[str, Any]:
    """Return the licence of a set, and its origin."""
    if stated:
        return {"license": stated, "license_from": "the recipe"}
    if file.is_file():
        value, origin = _metadata(file.with_name("README.md")).get("license"), "the README.md beside the file"
    else:
        value, origin = _hub_license(dataset), "its card on the Hub"
    return {
        "license": ", ".join(value) if isinstance(value, list) else value,
        "license_from": origin if value else None,
    }


def _hub_license(name: str) -> Any:
    """Return the licence on the Hub card of a data set; None without a card, a licence, or a connection."""
    try:
        return DatasetCard.load(name, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:
        return None


def _metadata(file: Path) -> dict[str, Any]:
    """Return the front matter of a card; empty if there is none that can be read."""
    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _file(file: Path) -> dict[str, Any]:
    """Describe the whole file of a set; `documents` counts its rows, and a .txt file is one document."""
    with file.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": sha256, "documents": _documents(file)}


def _documents(file: Path) -> int:
    if file.suffix == ".jsonl":
        with file.open("rb") as f:
            return sum(bool(line.strip()) for line in f)
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(file).metadata.num_rows)
    if file.suffix == ".json":
        return len(json.loads(file.read_text(encoding="utf-8-sig")))
    return 1
