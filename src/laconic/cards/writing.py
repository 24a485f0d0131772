"""Writing and updating the cards of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.artifact.identity import RECIPE, read_identity
from laconic.artifact.size import measure_size
from laconic.cards.data_card import data_card
from laconic.cards.facts import FOLDER, decode, describe_base, describe_set, digest, read_facts, write_facts
from laconic.cards.model_card import CardInputs, card_body, card_metadata
from laconic.cards.overlap import NGRAM, evaluation_texts, index, overlap
from laconic.cards.readme import merge
from laconic.cards.results import measured_on
from laconic.cards.sets import sets_of, token_ids
from laconic.checkpoint.atomic import write_text
from laconic.checkpoint.source import Source, load_tokenizer
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.data.text import HUB_TEXTS
from laconic.recipe import Recipe, load_recipe, read_recipe
from laconic.runtime.inputs import open_input

README, DATA = "README.md", "data.md"


def write_cards(
    folder: Path,
    recipe: Recipe,
    source: Source,
    *,
    name: str | None = None,
    trust: Trust = UNTRUSTED,
) -> list[str]:
    """Write the cards of a new artifact.

    Args:
        folder: Folder of the artifact.
        recipe: The recipe as the user wrote it, including what it declares of its texts.
        source: The original model.
        name: Name of the artifact, if it differs from the name of the folder.
        trust: Permissions of the model's files.

    Returns:
        Remarks, one line each, about parts of a README.md that stay as the user wrote them.

    Raises:
        ValueError: The tokenizer, or the facts of earlier cards, cannot be read.
    """
    identity = Artifact(folder).recipe or {}
    calibration = identity.get("calibration") or {}
    sets = []
    if text_sets := sets_of(recipe, calibrated=bool(calibration)):
        tokenizer = load_tokenizer(folder, trust=trust)
        for texts in text_sets:
            entry = describe_set(texts, tokenizer)
            hashes = (None, calibration.get("sha256"))
            entry["changed"] = texts.key == "calibration" and entry.get("sha256") not in hashes
            sets.append(entry)
    written = read_facts(folder).get("written", [])
    facts = {"base": describe_base(source), "sets": sets, "contamination": [], "written": written}
    return _write(folder, facts, trust, name)


def refresh_cards(folder: Path, *, trust: Trust = UNTRUSTED) -> list[str]:
    """Update the cards of an artifact to its current results; write them if it has none.

    Args:
        folder: Folder of the artifact.
        trust: Permissions of the model's files.

    Returns:
        Remarks, as `write_cards`.

    Raises:
        ValueError: The folder is not an artifact.
    """
    recipe = recipe_of(folder)
    if facts := read_facts(folder):
        return _write(folder, facts, trust)
    try:
        source = open_input(str(recipe.model), trust=trust)
    except ValueError:
        # The original is not available, so its licence and languages are unknown.
        name = str(recipe.model).rstrip("/")
        on_hub = name.count("/") == 1 and not name.startswith((".", "~", "/"))
        base = {"model": name if on_hub else None, "name": name.rpartition("/")[2]}
        return _write(folder, {"base": base, "sets": [], "contamination": [], "written": []}, trust)
    return write_cards(folder, recipe, source, trust=trust)


def check_against(
    folder: Path, evaluations: Sequence[str], *, n: int = NGRAM, trust: Trust = UNTRUSTED
) -> list[dict[str, Any]]:
    """Check the texts of an artifact for contamination, and write the outcome to its data card.

    Args:
        folder: Folder of the artifact.
        evaluations: Evaluation sets: files (.txt, .jsonl, .json, .parquet), folders of them, wikitext2, c4, or data
            sets of the Hub.
        n: Words per n-gram.
        trust: Permissions of the model's files.

    Returns:
        One mapping per text set and evaluation set: the counts of `Overlap`, or the reason under `unchecked`.

    Raises:
        ValueError: An evaluation set cannot be read, or the folder is not an artifact.
    """
    recipe = recipe_of(folder)
    facts = read_facts(folder)
    if not facts:
        refresh_cards(folder, trust=trust)
        facts = read_facts(folder)
    text_sets = sets_of(recipe, calibrated=bool((Artifact(folder).recipe or {}).get("calibration")))
    named = [each for name in evaluations for each in _evaluation(name)]
    if not text_sets:
        return []
    tokenizer = load_tokenizer(folder, trust=trust)
    facts_by_key = {s["key"]: s for s in facts["sets"]}
    checks: list[dict[str, Any]] = []
    for texts in text_sets:
        about = {"set": texts.key}
        try:
            ids = token_ids(texts, tokenizer)
        except (ValueError, OSError) as e:
            checks += [{**about, "against": name, "unchecked": " ".join(str(e).split())} for name, _ in named]
            continue
        if digest(ids) != facts_by_key.get(texts.key, {}).get("sha256", digest(ids)):
            reason = "the set has changed since it was used"
            checks += [{**about, "against": name, "unchecked": reason} for name, _ in named]
            continue
        indexed = index(decode(ids, tokenizer), n)
        for name, arguments in named:
            checks.append({**about, "against": name, **asdict(overlap(indexed, evaluation_texts(**arguments), n))})
    fresh = {(c["set"], c["against"], c.get("n")) for c in checks}
    older = [c for c in facts.get("contamination", []) if (c["set"], c["against"], c.get("n")) not in fresh]
    older = [c for c in older if "unchecked" not in c or (c["set"], c["against"]) not in {f[:2] for f in fresh}]
    _write(folder, {**facts, "contamination": [*older, *checks]}, trust)
    return checks


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of an artifact.

    Args:
        folder: Folder of the artifact.

    Raises:
        ValueError: The folder is not an artifact, or its recipe is invalid.
    """
    identity = read_identity(folder) if folder.is_dir() else None
    if identity is None or (identity and "recipe" not in identity):
        raise ValueError(
            f"{folder} is not a Laconic artifact, since it has no recipe.yaml; make one with 'laconic compress'"
        )
    return load_recipe(folder / RECIPE)


def _write(folder: Path, facts: dict[str, Any], trust: Trust, name: str | None = None) -> list[str]:
    """Write both cards; a README.md without the marks of Laconic stays unchanged."""
    artifact, size = Artifact.open_with_results(folder)[0], measure_size(folder, trust=trust)
    results, recipe = artifact.results, read_recipe(folder / RECIPE)
    name = name or folder.resolve().name
    inputs = CardInputs(name, facts, recipe, artifact.config, size, results)
    metadata = card_metadata(inputs)
    remarks: list[str] = []
    file = folder / README
    (folder / FOLDER).mkdir(exist_ok=True)
    write_text(folder / FOLDER / DATA, data_card(name, facts, measured_on(results)))
    written = facts.get("written") or []
    try:
        old = file.read_text(encoding="utf-8") if file.exists() else None
        merged = merge(old, metadata, card_body(inputs), written)
    except UnicodeDecodeError:
        remarks.append(f"{README} of {name} is not UTF-8 text, and was not updated; delete it to get a new one")
    except ValueError as e:
        remarks.append(f"{README} of {name} was not updated: {e}")
    else:
        # Written before the README and with both its current and its new metadata: after a kill between the two writes,
        # the next merge still recognizes either as Laconic's own.
        write_facts(folder, {**facts, "written": [*(w for w in written[-1:] if w != metadata), metadata]})
        write_text(file, merged.text)
        if merged.user_keys:
            remarks.append(
                f"{README} of {name} keeps the metadata that was edited by hand: {', '.join(merged.user_keys)}"
            )
        return remarks
    write_facts(folder, facts)
    return remarks


def _evaluation(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Resolve one value of `--against` to pairs of a name and the arguments of `evaluation_texts`."""
    if name in HUB_TEXTS:
        return [(name, HUB_TEXTS[name])]
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"--against {name}: the folder has no .txt, .jsonl or .parquet file")
        return [(f.name, {"dataset": str(f)}) for f in files]
    return [(path.name if path.is_file() else name, {"dataset": name})]
