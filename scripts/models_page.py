"""Try every model type that the installed transformers ships, and write what works into docs/models.md.

    python scripts/models_page.py try [TYPE ...]
    python scripts/models_page.py write

`try` makes a tiny random model of each type, takes it through the methods, a cache and an evaluation, and adds a line
to build/models.jsonl for each; types that have a line are skipped, so that it goes on where it was interrupted. `write`
puts these results into the page, where the markers stand.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "build" / "models.jsonl"
START, STOP = "<!-- types -->\n", "<!-- /types -->"
_HEADINGS = ("blocks alone", "rtn", "gptq", "awq", "smoothquant", "kivi", "eval", "transformers")
_STEPS = ("stream", "rtn", "gptq", "awq", "smoothquant", "cache", "eval")

Result = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Run one of the two commands."""
    if arguments[:1] == ["try"]:
        try_types(arguments[1:])
    elif arguments == ["write"]:
        results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        PAGE.write_text(with_types(PAGE.read_text(), results))
    else:
        sys.exit(__doc__)


def try_types(types: Sequence[str]) -> None:
    """Try these types, or all; append a line for each to the results."""
    import torch

    from every_model import check
    from shrunk import model_types
    from tiny import make_text

    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.touch()
    for model_type in types or model_types():
        if model_type in {json.loads(line)["model_type"] for line in RESULTS.read_text().splitlines()}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            text.write_text(make_text(6000))
            report = check(model_type, Path(folder) / "model", text)
        with RESULTS.open("a") as lines:
            lines.write(report.to_json() + "\n")
        print(model_type, {step: result for step, (result, _) in report.results.items()}, report.opens, flush=True)


def with_types(page: str, results: Sequence[Result]) -> str:
    """Return the page with a table of these results between its markers."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(STOP)
    return f"{before}{START}\n{describe(results)}\n{STOP}{after}"


def types_on(page: str) -> tuple[str, set[str]]:
    """Return the version of transformers and the model types that a page names."""
    _, _, rest = page.partition(START)
    table, _, _ = rest.partition(STOP)
    version = re.search(r"transformers (\d\S*\d)", table)
    types = set(re.findall(r"^\| ([a-z]\S*) \|", table, flags=re.M)) - {"type", "number"}
    return version[1] if version else "", types


def describe(results: Sequence[Result]) -> str:
    """Return the tables: types that can be treated, types that are refused, types that were not tried."""
    import transformers

    reasons: dict[str, int] = {}
    tried = [r for r in results if not _all(r, "not tried")]
    treated = sorted((r for r in tried if not _all(r, "refused")), key=lambda r: r["model_type"])
    refused = sorted((r for r in tried if _all(r, "refused")), key=lambda r: r["model_type"])
    skipped = sorted((r for r in results if _all(r, "not tried")), key=lambda r: r["model_type"])
    rows = [f"| {r['model_type']} | {' | '.join(_cells(r, reasons))} |" for r in treated]
    return "\n".join(
        [
            f"Tried with transformers {transformers.__version__}.",
            f"Of {len(results)} types {len(treated)} can be treated, {len(refused)} are refused, and of {len(skipped)} "
            "no tiny model was made.",
            "A number is that of the reason below.",
            "",
            f"| type | {' | '.join(_HEADINGS)} |",
            f"|{'---|' * (len(_HEADINGS) + 1)}",
            *rows,
            "",
            "| number | reason |",
            "|---|---|",
            *(f"| {number} | {reason} |" for reason, number in reasons.items()),
            "",
            "Refused whatever the method:",
            "",
            "| type | reason |",
            "|---|---|",
            *(f"| {r['model_type']} | {_reason(r, 'rtn')} |" for r in refused),
            "",
            "Not tried, since no tiny model was made of the type's config, or transformers runs none on text alone:",
            "",
            "| type | reason |",
            "|---|---|",
            *(f"| {r['model_type']} | {_reason(r, 'rtn')} |" for r in skipped),
            "",
        ]
    )


def _all(result: Result, what: str) -> bool:
    return all(r == what for r, _ in result["results"].values())


def _cells(result: Result, reasons: dict[str, int]) -> list[str]:
    cells = []
    for step in _STEPS:
        outcome, _ = result["results"][step]
        word = {"works": "yes", "not tried": "not tried"}.get(outcome, "no")
        cells.append(word if outcome == "works" else f"{word} ({_number(_reason(result, step), reasons)})")
    opens = result["opens"]
    if opens.startswith("no"):
        reason = re.sub(r"^no, and says so: transformers cannot open |; vLLM and laconic\.load can$", "", opens)
        return [*cells, f"no ({_number(f'transformers cannot open {reason}', reasons)})"]
    return [*cells, "yes" if opens else "-"]


def _number(reason: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(reason, len(reasons) + 1)


def _reason(result: Result, step: str) -> str:
    """Return the reason of a step as it holds for any model: without names and places."""
    outcome, text = result["results"][step]
    text = re.sub(r"^stages\.\d \(\w+\)(, [\w.]+)?: |^unsupported architecture '[^']*': |^no tiny model: ", "", text)
    text = re.sub(r"\s*\([\w.]+\.py:\d+(, [\w.]+\.py:\d+)?\)$", "", text)
    text = re.sub(r"blocks of '[^']*'", "blocks", text)
    text = re.sub(r"^'[^']*' ", "the model ", text)
    text = re.sub(r", so that \w+ cannot observe", ", so that it cannot observe", text)
    text = re.sub(r"no norm feeds [\w.]+ and", "no norm feeds a linear and", text)
    text = re.sub(r"experts \([\w.]+\) are", "experts are", text)
    text = re.sub(r"\[?You can install it with pip.*$|Please note that.*$", "", text)
    text = re.sub(r"^\w+: Class validation error for validator '\w+': ", "", text)
    text = re.sub(r"/\S*/(\w+)(?=[ /])", r"\1", text).replace("|", "/")
    return f"FAULT: {text}" if outcome == "fault" else text


if __name__ == "__main__":
    main(sys.argv[1:])
