"""The data card, `cards/data.md`: every text that an artifact was calibrated or trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOT_KNOWN = "**not known**"


def data_card(name: str, facts: Mapping[str, Any], measured: Sequence[str]) -> str:
    """Markdown. measured: texts and tasks on which the artifact was measured, by name."""
    sets = facts.get("sets") or []
    lines = [f"# Data of {name}", ""]
    if not sets:
        return "\n".join([*lines, "No text was read: nothing in the recipe calibrates or trains.", ""])
    unknown = [s["key"] for s in sets if not s.get("license")]
    if unknown:
        lines += [
            f"> **Licence not known** of {', '.join(f'`{key}`' for key in unknown)}. Find it out before this model is "
            "passed on; say it as `license` in the recipe, beside `dataset`.",
            "",
        ]
    for found in sets:
        lines += [f"## `{found['key']}`: {found['dataset']}", "", *_table(_rows(found)), ""]
    return "\n".join([*lines, *_contamination(sets, facts.get("contamination") or [], measured), ""])


def license_of(found: Mapping[str, Any]) -> str:
    """The licence of a set, and who says so."""
    return f"{found['license']} ({found['license_from']})" if found.get("license") else NOT_KNOWN


def _rows(found: Mapping[str, Any]) -> dict[str, str]:
    where = "a data set of the Hub" if found["on_hub"] else "a local file"
    more = ", ".join(f"{key} {found[key]}" for key in ("config", "split") if found.get(key))
    rows = {
        "used for": found["use"],
        "read from": f"{found['dataset']}, {where}" + (f" ({more})" if more else ""),
        "source": found.get("source") or (found["dataset"] if found["on_hub"] else "not declared"),
        "licence": license_of(found),
        "filters": "; ".join(found["filters"]),
    }
    if "unread" in found:
        return rows | {"sizes": f"not known: {found['unread']}"}
    rows["used"] = (
        f"{found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['text_bytes']:,} bytes of text"
    )
    if file := found.get("file"):
        rows["whole file"] = f"{file['documents']:,} documents, {file['bytes']:,} bytes"
        rows["SHA-256 of the file"] = f"`{file['sha256']}`"
    rows["SHA-256 of the tokens"] = f"`{found['sha256']}`" + (
        " (**not those of the run**: the set has changed since)" if found.get("changed") else ""
    )
    rows["languages"] = _languages(found.get("languages"))
    rows["domain"] = found.get("domain") or "not declared"
    return rows


def _languages(mix: Mapping[str, float] | None) -> str:
    if not mix:
        return "not detected (`pip install 'laconic[cards]'`, then `laconic card`)"
    named = {k: v for k, v in mix.items() if v >= 0.02}
    rest = 1 - sum(named.values())
    shares = [f"{k} {v:.0%}" for k, v in named.items()] + ([f"others {rest:.0%}"] if rest > 0.005 else [])
    return ", ".join(shares) + " (guessed by py3langid, which takes source code for some language)"


def _contamination(
    sets: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]], measured: Sequence[str]
) -> list[str]:
    lines = ["## Contamination", ""]
    if checks:
        lines += [
            "Runs of *n* words that stand both in an evaluation set and in the sequences that were used, in lower case "
            "and without punctuation. A document of fewer than *n* words cannot be judged. Word for word only: a "
            "translation or a paraphrase is not found.",
            "",
            "| set | evaluation set | n | documents judged | with an overlap | runs of n words | shared |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        lines += [_check_row(check) for check in checks]
        lines.append("")
    done = {check["against"] for check in checks if "unchecked" not in check}
    if left := [name for name in measured if not _checked(name, done)]:
        lines += [f"**Not checked** against {', '.join(left)}: `laconic card ARTIFACT --against FILE`.", ""]
    elif not checks:
        lines += ["**Not checked** against any evaluation set: `laconic card ARTIFACT --against FILE`.", ""]
    return lines


def _checked(measured: str, against: set[str]) -> bool:
    """Whether a text, or a task, was looked for by one of these names: `mmlu_law` is in `mmlu.jsonl`."""
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
