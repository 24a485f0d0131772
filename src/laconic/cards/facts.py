"""What the cards say and no other file of an artifact has: `cards/facts.json`. The cards are drawn from it."""

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
_CARRIED = ("license", "license_name", "license_link", "language")


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of an artifact; nothing where it was made without cards.

    Raises: ValueError for a file that is none of ours.
    """
    file = folder / FOLDER / FACTS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not valid JSON; delete it, and run 'laconic card {folder}'") from e
    if not isinstance(facts, dict):
        raise ValueError(f"{file} holds no keys and values; delete it, and run 'laconic card {folder}'")
    return facts


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Keep them, whole or not at all."""
    (folder / FOLDER).mkdir(exist_ok=True)
    write_text(folder / FOLDER / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def describe_base(source: Source) -> dict[str, Any]:
    """The original: its name, and the licence and languages that its own card tells."""
    carried = {k: v for k, v in _metadata(source.folder / "README.md").items() if k in _CARRIED and v}
    return {
        "model": hub_id(source),
        "name": hub_id(source) or source.folder.resolve().name,
        "file_bytes": source.checkpoint.nbytes,
        "dtype": str(source.dtype).removeprefix("torch."),
        "license_file": next((f.name for f in sorted(source.folder.glob("LICENSE*"))), None),
        **carried,
    }


def hub_id(source: Source) -> str | None:
    """The name on the Hub of a model that was fetched from there; None for a folder of one's own."""
    for part in source.folder.resolve().parts[::-1]:
        # The Hub's cache: models--OWNER--NAME/snapshots/REVISION
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None if Path(source.name).expanduser().is_dir() else source.name


def describe_set(texts: TextSet, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Source, licence, filters, sizes, hash and languages of a set. One that cannot be read says so under `unread`."""
    spec = texts.spec
    file = Path(spec.dataset).expanduser()
    said = declared(texts)
    told: dict[str, Any] = {
        "key": texts.key,
        "use": texts.use,
        "dataset": file.name if file.is_file() else spec.dataset,
        "on_hub": not file.is_file(),
        "config": spec.config,
        "split": None if file.is_file() else spec.split,
        **said,
        **_license(spec.dataset, file, said["license"]),
        "filters": filters_of(texts),
    }
    try:
        ids = token_ids(texts, tokenizer)
        told["file"] = _file(file) if file.is_file() else None
    except (ValueError, OSError) as e:
        return told | {"unread": " ".join(str(e).split())}
    pieces = decode(ids, tokenizer)
    return told | {
        "sequences": len(ids),
        "tokens": sum(len(i) for i in ids),
        "text_bytes": sum(len(p.encode()) for p in pieces),
        "sha256": digest(ids),
        "languages": language_mix(pieces),
    }


def decode(ids: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of sequences."""
    return [str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids]


def digest(ids: Sequence[Tensor]) -> str:
    """Of token ids: what the artifact's recipe.yaml has for its calibration set."""
    found = hashlib.sha256()
    for sequence in ids:
        found.update(sequence.contiguous().numpy().tobytes())
    return found.hexdigest()


def _license(dataset: str, file: Path, stated: str | None) -> dict[str, Any]:
    """The licence of a set, and who says so."""
    if stated:
        return {"license": stated, "license_from": "the recipe"}
    if file.is_file():
        found, where = _metadata(file.with_name("README.md")).get("license"), "the README.md beside the file"
    else:
        found, where = _hub_license(dataset), "its card on the Hub"
    return {"license": ", ".join(found) if isinstance(found, list) else found, "license_from": where if found else None}


def _hub_license(name: str) -> Any:
    """What the card of a data set says; None where there is no card, no licence in it, or no way to it."""
    try:
        return DatasetCard.load(name, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:
        return None


def _metadata(file: Path) -> dict[str, Any]:
    """The front matter of a card; nothing where there is none that can be read."""
    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _file(file: Path) -> dict[str, Any]:
    """The whole file that a set is from. documents: rows of it; a .txt file is one."""
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
