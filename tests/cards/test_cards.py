"""The cards of an artifact: written by compress, brought up to date by eval, never at a person's cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import laconic as library
from commands import Laconic
from laconic.cards.facts import digest, hub_id
from laconic.cards.results import model_index
from laconic.cards.writing import check_against, refresh_cards, write_cards
from laconic.checkpoint.source import open_source
from laconic.pipeline.provenance import identify
from laconic.recipe import load_recipe
from tiny import make_text

SAYS = {"license": "cc-by-4.0", "source": "https://example.org/texts", "domain": "nonsense"}


@pytest.fixture(scope="module")
def original(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a card of its own."""
    folder = tmp_path_factory.mktemp("original") / "llama"
    shutil.copytree(llama, folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: [en]\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words short enough that a window of 64 letters has several."""
    file = tmp_path_factory.mktemp("texts") / "calibration.txt"
    file.write_text(" ".join(make_text(4000)))
    return file


@pytest.fixture(scope="module")
def made(original: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    calibration = {"dataset": str(texts), "num_calibration_samples": 8, "max_seq_length": 64}
    recipe = {"stages": [{"method": "gptq", "scheme": "W4A16", "group_size": 32}], "calibration": calibration}
    return library.compress(str(original), recipe, tmp_path_factory.mktemp("made") / "tiny-w4").path


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """One's own to change."""
    return Path(shutil.copytree(made, tmp_path / "tiny-w4"))


def save(folder: Path, name: str, result: dict[str, Any]) -> None:
    (folder / "results" / f"{name}.json").write_text(json.dumps(result))


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "cards" / "facts.json").read_text()))


EVAL = {
    "text": "wikitext2",
    "context_length": 64,
    "windows": 3,
    "dtype": "float32",
    "perplexity": 12.5,
    "baseline_perplexity": 11.25,
    "kl_mean": 0.0125,
    "kl_p99": 0.5,
    "top1_agreement": 0.875,
    "command": "/home/somebody/bin/laconic eval /home/somebody/out/tiny-w4 --baseline ~/models/llama",
}
TASKS = {
    "shots": {"piqa": 0},
    "rows": [
        {
            "task": "piqa",
            "metric": "acc",
            "higher_is_better": True,
            "documents": 20,
            "value": 0.55,
            "stderr": 0.11,
            "baseline": 0.6,
            "baseline_stderr": 0.11,
            "difference": -0.05,
            "difference_stderr": 0.05,
        }
    ],
    "command": "laconic eval tiny-w4 --tasks piqa",
}


def test_every_artifact_has_a_card_that_the_hubs_library_reads(made: Path) -> None:
    card = ModelCard.load(made / "README.md")
    assert card.data.license == "other"
    assert card.data.license_name == "tiny"
    assert card.data.language == ["en"]
    assert card.data.base_model is None  # a folder of one's own has no name on the Hub
    assert card.data.library_name == "transformers"
    assert set(card.data.tags or ()) >= {"laconic", "compressed-tensors", "gptq", "W4A16"}
    assert card.data.to_dict()["quantization"]["schemes"] == {"W4A16": 14}
    assert "Not measured yet" in card.text
    assert str(made.parent) not in card.text
    assert "not known" in card.text


def test_results_go_into_the_model_index_and_come_back_as_they_were(artifact: Path) -> None:
    save(artifact, "eval-wikitext2-64-3", EVAL)
    save(artifact, "tasks-piqa", TASKS)
    assert refresh_cards(artifact) == []
    card = ModelCard.load(artifact / "README.md")
    index = yaml.safe_load((artifact / "README.md").read_text().split("---")[1])["model-index"]
    _, read = model_index_to_eval_results(index)
    assert "&id" not in (artifact / "README.md").read_text()
    written = model_index({"eval-wikitext2-64-3": EVAL, "tasks-piqa": TASKS})
    values = {r.metric_type: r.metric_value for r in read}
    assert values == {"perplexity": 12.5, "kl_divergence": 0.0125, "top1_agreement": 0.875, "acc": 0.55}
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in read] == [
        (r.metric_type, r.metric_value, r.dataset_type) for r in written
    ]
    assert read[0].dataset_type == "Salesforce/wikitext"
    assert "| wikitext2 | 3 x 64 | float32 | 12.500 | 11.250 | 0.0125 / 0.500 | 87.5% |" in card.text
    assert "-0.0500 ± 0.0500" in card.text
    assert "laconic eval tiny-w4 --baseline llama" in card.text
    assert "somebody" not in card.text


def test_each_domain_is_a_text_of_its_own(artifact: Path) -> None:
    rows = [
        {**EVAL, "domain": name, "text": f"/data/{name}.txt", "perplexity": p} for name, p in (("web", 9), ("code", 3))
    ]
    shared = {key: EVAL[key] for key in ("context_length", "dtype", "command")}
    save(artifact, "domains-web+code-64", {**shared, "domains": rows})
    refresh_cards(artifact)
    card = ModelCard.load(artifact / "README.md")
    found = {r.dataset_name: r.metric_value for r in card.data.eval_results or () if r.metric_type == "perplexity"}
    assert found == {"web.txt": 9, "code.txt": 3}
    assert "| web.txt (web) | 3 x 64 | float32 | 9.000 |" in card.text


def test_a_card_that_a_person_edited_keeps_what_they_wrote(artifact: Path) -> None:
    file = artifact / "README.md"
    file.write_text(file.read_text().replace("license: other", "license: mit") + "\nTry it on poems.\n")
    save(artifact, "eval-wikitext2-64-3", EVAL)
    (said,) = refresh_cards(artifact)
    assert "keeps the metadata that was edited by hand: license" in said
    assert "Try it on poems." in file.read_text()
    assert "12.500" in file.read_text()
    assert ModelCard.load(file).data.license == "mit"


def test_a_card_of_a_persons_own_is_left_alone(artifact: Path) -> None:
    file = artifact / "README.md"
    file.write_text("# All mine\n")
    (said,) = refresh_cards(artifact)
    assert "was not updated" in said
    assert file.read_text() == "# All mine\n"


def test_overwriting_an_artifact_keeps_what_a_person_wrote_in_its_card(artifact: Path, original: Path) -> None:
    file = artifact / "README.md"
    file.write_text(file.read_text() + "\nTry it on poems.\n")
    stages = {"stages": [{"method": "rtn", "scheme": "W8A16"}]}
    library.compress(str(original), stages, artifact, overwrite=True)
    assert "Try it on poems." in file.read_text()
    assert ModelCard.load(file).data.to_dict()["quantization"]["schemes"] == {"W8A16": 14}
    assert "No text was read" in (artifact / "cards" / "data.md").read_text()


def test_the_data_card_tells_sizes_and_hashes(made: Path, texts: Path) -> None:
    (told,) = facts_of(made)["sets"]
    calibration = library.Artifact(made).recipe["calibration"]  # type: ignore[index]
    assert (told["sequences"], told["tokens"]) == (calibration["samples"], calibration["tokens"])
    assert told["sha256"] == calibration["sha256"]
    assert told["file"]["bytes"] == texts.stat().st_size
    assert told["changed"] is False
    page = (made / "cards" / "data.md").read_text()
    assert "**Licence not known** of `calibration`" in page
    assert "not declared" in page
    assert str(texts.parent) not in page


def test_what_a_recipe_declares_is_told_and_changes_nothing_else(made: Path, original: Path) -> None:
    plain = load_recipe(library.Artifact(made).recipe["recipe"])  # type: ignore[index]
    says = load_recipe(plain, [f"calibration.{key}={value}" for key, value in SAYS.items()])
    source = open_source(str(original))
    assert identify(says, source, None) == identify(plain, source, None)
    folder = made.with_name("declared")
    shutil.copytree(made, folder)
    write_cards(folder, says, source)
    (told,) = facts_of(folder)["sets"]
    assert {key: told[key] for key in SAYS} == SAYS
    assert "cc-by-4.0 (the recipe)" in (folder / "cards" / "data.md").read_text()
    assert "Licence not known" not in (folder / "cards" / "data.md").read_text()


def test_every_part_of_a_mix_may_declare_without_being_another_run(original: Path) -> None:
    data = [{"dataset": "a.txt"}, {"dataset": "b.txt", **SAYS}]
    source = open_source(str(original))
    said, plain = (
        identify(load_recipe({"stages": [{"method": "lora", "data": parts}]}), source, None)
        for parts in (data, [{"dataset": part["dataset"]} for part in data])
    )
    assert said == plain


def test_the_licence_beside_a_file_is_found(made: Path, original: Path, texts: Path) -> None:
    folder = made.with_name("beside")
    shutil.copytree(made, folder)
    card = texts.with_name("README.md")
    card.write_text("---\nlicense: odc-by\n---\n")
    write_cards(folder, load_recipe(library.Artifact(made).recipe["recipe"]), open_source(str(original)))  # type: ignore[index]
    card.unlink()
    (told,) = facts_of(folder)["sets"]
    assert (told["license"], told["license_from"]) == ("odc-by", "the README.md beside the file")


def test_contamination_is_counted_and_told(artifact: Path, texts: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean.txt"
    clean.write_text(" ".join(f"word{i}" for i in range(30)))
    dirty, fresh = check_against(artifact, [str(texts), str(clean)])
    assert dirty["hit"] == 1
    assert 0 < dirty["shared"] < dirty["ngrams"]
    assert (fresh["judged"], fresh["hit"], fresh["shared"]) == (1, 0, 0)
    page = (artifact / "cards" / "data.md").read_text()
    assert "| `calibration` | calibration.txt | 13 | 1 of 1 | 1 (100.00%) |" in page
    assert "| `calibration` | clean.txt | 13 | 1 of 1 | 0 (0.00%) |" in page


def test_a_set_that_changed_or_went_is_not_checked_and_says_so(artifact: Path, texts: Path) -> None:
    before = texts.read_text()
    try:
        texts.write_text("another text " * 400)
        (changed,) = check_against(artifact, [str(texts)])
        assert changed["unchecked"] == "the set has changed since it was used"
        texts.unlink()
        (gone,) = check_against(artifact, ["wikitext2"])
        assert "no text file" in gone["unchecked"]
    finally:
        texts.write_text(before)


def test_measured_texts_that_were_not_checked_are_named(artifact: Path, tmp_path: Path) -> None:
    save(artifact, "eval-wikitext2-64-3", EVAL)
    save(artifact, "tasks-piqa", TASKS)
    refresh_cards(artifact)
    assert "**Not checked** against wikitext2, piqa: " in (artifact / "cards" / "data.md").read_text()
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"question": "how?", "choices": ["so", "thus"]}) + "\n")
    check_against(artifact, [str(tmp_path / "piqa.jsonl")])
    assert "**Not checked** against wikitext2: " in (artifact / "cards" / "data.md").read_text()


def test_eval_brings_the_card_up_to_date(laconic: Laconic, artifact: Path, texts: Path) -> None:
    ran = laconic("eval", artifact, "--text", texts, "--context-length", 64, "--windows", 2, "--json")
    assert ran.code == 0, ran.err
    results = ModelCard.load(artifact / "README.md").data.eval_results or []
    assert [r.metric_value for r in results] == [json.loads(ran.out)["perplexity"]]


def test_card_prints_what_it_found(laconic: Laconic, artifact: Path, texts: Path) -> None:
    ran = laconic("card", artifact, "--against", texts, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["contamination"][0]["hit"] == 1
    assert all(Path(name).is_file() for name in told["cards"])


def test_a_recipe_recorded_before_a_key_was_renamed_is_read(laconic: Laconic, artifact: Path) -> None:
    file = artifact / "recipe.yaml"
    file.write_text(file.read_text().replace("asymmetric_calibration: 0.0", "asymmetric: 0.0"))
    assert "asymmetric: 0.0" in file.read_text()
    for arguments in (["card", artifact], ["push", artifact, "owner/tiny", "--dry-run"]):
        ran = laconic(*arguments)
        assert ran.code == 0, ran.err
    assert "asymmetric_calibration: 0.0" in (artifact / "README.md").read_text()


def test_wrong_input_is_one_line(laconic: Laconic, artifact: Path, llama: Path, tmp_path: Path) -> None:
    assert "is not a Laconic artifact" in laconic("card", llama).complaint
    assert "is not a Laconic artifact" in laconic("card", tmp_path / "nothing").complaint
    assert "no text file" in laconic("card", artifact, "--against", "nothing.txt").complaint
    (tmp_path / "empty").mkdir()
    assert "has no .txt" in laconic("card", artifact, "--against", tmp_path / "empty").complaint
    (artifact / "cards" / "facts.json").write_text("{")
    assert "facts.json is not valid JSON; delete it" in laconic("card", artifact).complaint


def test_a_model_from_the_hub_is_named_as_there(tmp_path: Path, original: Path) -> None:
    cached = tmp_path / "models--owner--some--name" / "snapshots" / "0123"
    shutil.copytree(original, cached)
    assert hub_id(open_source(str(cached))) == "owner/some--name"
    assert hub_id(open_source(str(original))) is None


def test_a_digest_of_rows_is_that_of_the_whole() -> None:
    import torch

    from laconic.pipeline.provenance import sha256

    ids = torch.arange(24).view(4, 6)
    assert digest(list(ids)) == sha256(ids)
