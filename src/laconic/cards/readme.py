"""A README.md that two write: Laconic between its marks and in its own metadata, a person everywhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

BEGIN = "<!-- laconic:begin - written anew by laconic; what stands above or below is yours -->"
END = "<!-- laconic:end -->"
_MARKED = re.compile(r"<!-- laconic:begin\b.*?-->.*?<!-- laconic:end -->", re.S)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)


@dataclass(frozen=True)
class Merged:
    """kept: keys of the metadata that say what a person wrote, where Laconic would say something else."""

    text: str
    kept: tuple[str, ...] = ()


def merge(old: str | None, metadata: Mapping[str, Any], body: str, written: Sequence[Mapping[str, Any]]) -> Merged:
    """A README.md with this metadata and body. old: what stands there. written: the metadata that Laconic may have
    left there the last time; a key that differs from all of it by now is a person's, and stays as it is.

    Raises: ValueError when there is no telling what of it is whose.
    """
    marked = f"{BEGIN}\n{body.strip()}\n{END}"
    if old is None:
        return Merged(f"---\n{_dump(metadata)}---\n\n{marked}\n")
    if len(_MARKED.findall(old)) != 1:
        raise ValueError("it lacks Laconic's marks, or has them twice, so all of it is left as somebody wrote it")
    front = _FRONT.match(old)
    theirs = _read(front[1]) if front else {}
    told = dict(theirs)
    for key in {k: None for each in (metadata, *written) for k in each}:
        if any(theirs.get(key) == each.get(key) for each in written or [{}]):
            if key in metadata:
                told[key] = metadata[key]
            else:
                told.pop(key, None)
    kept = tuple(key for key in metadata if told.get(key) != metadata[key])
    rest = _MARKED.sub(lambda _: marked, old[front.end() :] if front else old)
    if front and told == theirs:
        return Merged(front[0] + rest, kept)
    return Merged(f"---\n{_dump(told)}---\n{rest}", kept)


def _dump(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)


def _read(text: str) -> dict[str, Any]:
    try:
        found: Any = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise ValueError(f"its metadata is not valid YAML ({getattr(e, 'problem', None) or 'unreadable'})") from e
    if not isinstance(found, dict):
        raise ValueError("its metadata holds no keys and values")
    return found
