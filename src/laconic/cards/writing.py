"""Write the cards of an artifact, and write them anew when more is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laconic.artifact.artifact import Artifact
from laconic.artifact.size import measure_size
from laconic.cards.data_card import data_card
from laconic.cards.facts import FOLDER, decode, describe_base, describe_set, digest, read_facts, write_facts
from laconic.cards.model_card import body, metadata
from laconic.cards.overlap import NGRAM, evaluation_texts, index, overlap
from laconic.cards.readme import merge
from laconic.cards.results import measured_on
from laconic.cards.sets import sets_of, token_ids
from laconic.checkpoint.atomic import write_text
from laconic.checkpoint.source import Source, load_tokenizer, open_source
from laconic.data.text import HUB_TEXTS
from laconic.recipe import Recipe, load_recipe

README, DATA = "README.md", "data.md"


def write_cards(
    folder: Path, recipe: Recipe, source: Source, *, name: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """The cards of an artifact that was just made. recipe: as it was given, with what it declares of its texts. name:
    the artifact's, where the folder does not have it yet.

    Returns: remarks, one line each, on what of a README.md was left as a person wrote it.
    """
    identity = Artifact(folder).recipe or {}
    told = identity.get("calibration") or {}
    sets = []
    if wanted := sets_of(recipe, calibrated=bool(told)):
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        for texts in wanted:
            found = describe_set(texts, tokenizer)
            found["changed"] = texts.key == "calibration" and found.get("sha256") not in (None, told.get("sha256"))
            sets.append(found)
    written = read_facts(folder).get("written", [])
    facts = {"base": describe_base(source), "sets": sets, "contamination": [], "written": written}
    return _draw(folder, facts, name)


def refresh_cards(folder: Path) -> list[str]:
    """Draw the cards of an artifact with the results it has by now; of one that was made without any, make them.

    Returns: remarks, as `write_cards`. Raises: ValueError for a folder that is no artifact.
    """
    recipe = recipe_of(folder)
    if facts := read_facts(folder):
        return _draw(folder, facts)
    try:
        source = open_source(str(recipe.model))
    except ValueError:
        # Where the original is gone, nothing can be carried over from it.
        name = str(recipe.model).rstrip("/")
        on_hub = name.count("/") == 1 and not name.startswith((".", "~", "/"))
        base = {"model": name if on_hub else None, "name": name.rpartition("/")[2]}
        return _draw(folder, {"base": base, "sets": [], "contamination": [], "written": []})
    return write_cards(folder, recipe, source)


def check_against(folder: Path, evaluations: Sequence[str], *, n: int = NGRAM) -> list[dict[str, Any]]:
    """Look for evaluation sets in the texts of an artifact, and keep what was found in its data card.

    evaluations: files (.txt, .jsonl, .json, .parquet), folders of them, wikitext2, c4, or Hub data sets. n: words that
    must be the same in a row.
    Returns: one mapping a set and evaluation set. Raises: ValueError for what cannot be read, or no artifact.
    """
    recipe = recipe_of(folder)
    facts = read_facts(folder)
    if not facts:
        refresh_cards(folder)
        facts = read_facts(folder)
    wanted = sets_of(recipe, calibrated=bool((Artifact(folder).recipe or {}).get("calibration")))
    named = [each for name in evaluations for each in _evaluation(name)]
    if not wanted:
        return []
    tokenizer = load_tokenizer(folder)
    known = {s["key"]: s for s in facts["sets"]}
    found: list[dict[str, Any]] = []
    for texts in wanted:
        about = {"set": texts.key}
        try:
            ids = token_ids(texts, tokenizer)
        except (ValueError, OSError) as e:
            found += [{**about, "against": name, "unchecked": " ".join(str(e).split())} for name, _ in named]
            continue
        if digest(ids) != known.get(texts.key, {}).get("sha256", digest(ids)):
            why = "the set has changed since it was used"
            found += [{**about, "against": name, "unchecked": why} for name, _ in named]
            continue
        seen = index(decode(ids, tokenizer), n)
        for name, where in named:
            found.append({**about, "against": name, **asdict(overlap(seen, evaluation_texts(**where), n))})
    fresh = {(c["set"], c["against"], c.get("n")) for c in found}
    older = [c for c in facts.get("contamination", []) if (c["set"], c["against"], c.get("n")) not in fresh]
    older = [c for c in older if "unchecked" not in c or (c["set"], c["against"]) not in {f[:2] for f in fresh}]
    _draw(folder, {**facts, "contamination": [*older, *found]})
    return found


def recipe_of(folder: Path) -> Recipe:
    """The recipe of an artifact. Raises: ValueError for a folder that is none."""
    identity = Artifact(folder).recipe if folder.is_dir() else None
    if not isinstance(identity, dict) or "recipe" not in identity:
        raise ValueError(f"{folder} is no artifact of Laconic: it has no recipe.yaml; make one with 'laconic compress'")
    return load_recipe(identity["recipe"])


def _draw(folder: Path, facts: dict[str, Any], name: str | None = None) -> list[str]:
    """Both cards. A README.md that cannot be told apart from a person's stays as it is."""
    artifact, size = Artifact.measured(folder)[0], measure_size(folder)
    results, recipe = artifact.results, (artifact.recipe or {})["recipe"]
    name = name or folder.resolve().name
    told = name, facts, recipe, artifact.config, size, results
    ours = metadata(*told)
    remarks: list[str] = []
    file = folder / README
    (folder / FOLDER).mkdir(exist_ok=True)
    write_text(folder / FOLDER / DATA, data_card(name, facts, measured_on(results)))
    written = facts.get("written") or []
    try:
        old = file.read_text(encoding="utf-8") if file.exists() else None
        merged = merge(old, ours, body(*told), written)
    except UnicodeDecodeError:
        remarks.append(f"{README} of {name} is not UTF-8 text, and was left as it is")
    except ValueError as e:
        remarks.append(f"{README} of {name} was not brought up to date: {e}")
    else:
        # Before the file itself, and with what it has now: whichever of the two a kill leaves there is known as ours.
        write_facts(folder, {**facts, "written": [*(w for w in written[-1:] if w != ours), ours]})
        write_text(file, merged.text)
        if merged.kept:
            remarks.append(f"{README} of {name} keeps what was changed by hand: {', '.join(merged.kept)}")
        return remarks
    write_facts(folder, facts)
    return remarks


def _evaluation(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Evaluation sets by the name they go by, each with what reads it."""
    if name in HUB_TEXTS:
        return [(name, HUB_TEXTS[name])]
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"--against {name}: the folder has no .txt, .jsonl or .parquet file")
        return [(f.name, {"dataset": str(f)}) for f in files]
    return [(path.name if path.is_file() else name, {"dataset": name})]
