"""The data card, `cards/data.md`: every text set that an artifact was calibrated or trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_KNOWN = "**not known**"


def data_card(name: str, facts: Mapping[str, Any], measured: Sequence[str]) -> str:
    """Write the data card.

    Args:
        name: Name of the artifact.
        facts: Facts of `read_facts`.
        measured: Names of the texts and tasks that the artifact was measured on.

    Returns:
        Markdown.
    """
    sets = facts.get("sets") or []
    lines = [f"# Data of {name}", ""]
    if not sets:
        return "\n".join([*lines, "No text was read: no stage of the recipe calibrates or trains.", ""])
    unknown = [s["key"] for s in sets if not s.get("license")]
    if unknown:
        lines += [
            f"> **Licence not known** of {', '.join(f'`{key}`' for key in unknown)}. Find it out before you distribute "
            "this model, and write it as `license` in the recipe, beside `dataset`.",
            "",
        ]
    for entry in sets:
        lines += [f"## `{entry['key']}`: {entry['dataset']}", "", *_table(_rows(entry)), ""]
    return "\n".join([*lines, *_contamination(sets, facts.get("contamination") or [], measured), ""])


def license_of(entry: Mapping[str, Any]) -> str:
    """Return the licence of a set, with its origin.

    Args:
        entry: Facts of the set, an item of `sets` in `read_facts`.
    """
    return f"{entry['license']} ({entry['license_from']})" if entry.get("license") else NOT_KNOWN


def _rows(entry: Mapping[str, Any]) -> dict[str, str]:
    where = "a data set of the Hub" if entry["on_hub"] else "a local file"
    more = ", ".join(f"{key} {entry[key]}" for key in ("config", "split") if entry.get(key))
    rows = {
        "used for": entry["use"],
        "read from": f"{entry['dataset']}, {where}" + (f" ({more})" if more else ""),
        "source": entry.get("source") or (entry["dataset"] if entry["on_hub"] else "not declared"),
        "licence": license_of(entry),
        "filters": "; ".join(entry["filters"]),
    }
    if "unread" in entry:
        return rows | {"sizes": f"not known: {entry['unread']}"}
    rows["used"] = (
        f"{entry['sequences']:,} sequences, {entry['tokens']:,} tokens, {entry['text_bytes']:,} bytes of text"
    )
    if file := entry.get("file"):
        rows["whole file"] = f"{file['documents']:,} documents, {file['bytes']:,} bytes"
        rows["SHA-256 of the file"] = f"`{file['sha256']}`"
    rows["SHA-256 of the tokens"] = f"`{entry['sha256']}`" + (
        " (**differs from the run**: the set has changed since)" if entry.get("changed") else ""
    )
    rows["languages"] = _languages(entry.get("languages"))
    rows["domain"] = entry.get("domain") or "not declared"
    return rows


def _languages(mix: Mapping[str, float] | None) -> str:
    if not mix:
        return "not detected (`pip install 'laconic[cards]'`, then `laconic card`)"
    named = {k: v for k, v in mix.items() if v >= 0.02}
    rest = 1 - sum(named.values())
    shares = [f"{k} {v:.0%}" for k, v in named.items()] + ([f"other {rest:.0%}"] if rest > 0.005 else [])
    return ", ".join(shares) + " (estimated by py3langid, which has no class for source code)"


def _contamination(
    sets: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], measured: Sequence[str]
) -> list[str]:
    lines = ["## Contamination", ""]
    if checks:
        lines += [
            "N-grams of *n* words, in lower case and without punctuation, that occur both in an evaluation set and in "
            "the sequences that were used. A document of fewer than *n* words cannot be judged. Matches are verbatim: "
            "translations and paraphrases are not detected.",
            "",
            "| set | evaluation set | n | documents judged | with overlap | n-grams | shared n-grams |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_check_row(check) for check in checks]
        lines.append("")
    checked = {check["against"] for check in checks if "unchecked" not in check}
    if unchecked := [name for name in measured if not _is_checked(name, checked)]:
        lines += [f"**Not checked** against {', '.join(unchecked)}: `laconic card ARTIFACT --against FILE`.", ""]
    elif not checks:
        lines += ["**Not checked** against any evaluation set: `laconic card ARTIFACT --against FILE`.", ""]
    return lines


def _is_checked(measured: str, against: set[str]) -> bool:
    """Return whether a text or task belongs to one of these sets; `mmlu_law` belongs to `mmlu.jsonl`."""
    names = {name.rpartition(".")[0].removesuffix("_test") or name for name in against}
    return measured in against or any(measured == name or measured.startswith(f"{name}_") for name in names)


def _check_row(check: Mapping[str, Any]) -> str:
    if "unchecked" in check:
        return f"| `{check['set']}` | {check['against']} | | not checked: {check['unchecked']} | | | |"
    judged, grams = check["judged"], check["ngrams"]
    return (
        f"| `{check['set']}` | {check['against']} | {check['n']} | {judged:,} of {check['documents']:,} "
        f"| {_share(check['hit'], judged)} | {grams:,} | {_share(check['shared'], grams)} |"
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.2%})" if whole else "-"


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {' '.join(value.split())} |" for key, value in rows.items())]
