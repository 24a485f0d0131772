"""The command line: exit codes, JSON that a program can read, a plan that comes true."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import laconic as library
from commands import Laconic, Ran
from laconic.methods import METHODS
from laconic.recipe import gallery
from laconic.report.catalogue import describe
from laconic.stages.stage import Stage, method_name
from tiny import make_model, make_recipe

RTN = {"method": "rtn", "scheme": "W8A16"}
GPTQ = {"method": "gptq", "scheme": "W4A16", "group_size": 32}
LACONIC = Path(sys.executable).with_name("laconic")


@pytest.fixture
def recipe(llama: Path, text: Path, tmp_path: Path) -> Path:
    """A whole recipe, model and output included."""
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    keys = {"model": str(llama), "output": str(tmp_path / "out"), "calibration": calibration}
    return make_recipe(tmp_path / "recipe.yaml", GPTQ, **keys)


@pytest.fixture(scope="module")
def artifact(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 8 bits. Not to be changed, but for results."""
    return library.compress(str(llama), {"stages": [RTN]}, tmp_path_factory.mktemp("artifact") / "out").path


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


def json_of(ran: Ran) -> Any:
    """The one JSON object on stdout."""
    assert ran.code == 0, ran.err
    value = json.loads(ran.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(value, dict)
    return value


# --- exit codes ---


def test_done_is_0(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    ran = laconic("compress", recipe)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{tmp_path}/out: ")


def test_a_mistake_of_ours_is_1_with_a_traceback(
    laconic: Laconic, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["laconic.pipeline.walk_step"], "stream", fail)
    ran = laconic("compress", recipe)
    assert (ran.code, ran.out) == (1, "")
    assert "Traceback" in ran.err
    assert "RuntimeError: a bug" in ran.err


def test_an_interruption_is_130_and_says_how_to_go_on(
    laconic: Laconic, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["laconic.pipeline.walk_step"], "stream", interrupt)
    ran = laconic("compress", recipe)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == "interrupted; run the same command again to resume\n"


def test_version(laconic: Laconic) -> None:
    assert laconic("--version").out == f"laconic {library.__version__}\n"


def test_help_is_0_and_no_command_is_2(laconic: Laconic) -> None:
    assert laconic("--help").code == 0
    assert laconic("compress", "--help").code == 0
    assert laconic().code == 2


@pytest.mark.slow
def test_the_installed_command_is_interrupted_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    # Long enough that a signal finds it at work, on a busy machine too.
    slow = "stages=[{method: autoround, scheme: W4A16, group_size: 32, iters: 1200}]"
    command = [LACONIC, "compress", recipe, "--set", slow]
    # A test run in the background, as nohup starts it, ignores interruptions, and its children would too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


@given(st.text(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_set_is_0_or_2(laconic: Laconic, setting: str) -> None:
    ran = laconic("validate", "rtn-w4a16", "--set", setting)
    assert ran.code == 0 or ran.complaint


# --- JSON ---


def test_compress_json(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    told = json_of(laconic("compress", recipe, "--json"))
    assert told["output"] == str(tmp_path / "out")
    assert told["seconds"] > 0
    assert told["forecast"]["bytes_before"] > told["forecast"]["bytes_after"]


def test_compress_dry_run_json(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    told = json_of(laconic("compress", recipe, "--dry-run", "--json"))
    assert (told["schemes"], told["blocks"], told["output"]) == ({"W4A16": 14}, 2, str(tmp_path / "out"))


def test_eval_inspect_and_report_json(
    laconic: Laconic, artifact: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    # A single window has no standard error, and JSON no NaN.
    window = ("--text", text, "--context-length", 64, "--windows", 1)
    measured = json_of(laconic("eval", artifact, "--baseline", llama, *window, "--json"))
    assert (measured["windows"], measured["tokens"], measured["nll_stderr"]) == (1, 63, None)
    inspected = json_of(laconic("inspect", artifact, "--json"))
    assert inspected["schemes"] == measured["schemes"] == {"W8A16": 14}
    reported = json_of(laconic("report", artifact, "-o", tmp_path / "page.html", "--json"))
    files = [str(tmp_path / f"page.{kind}") for kind in ("html", "md", "csv")]
    assert reported == {"page": files[0], "files": files, "artifacts": [str(artifact)]}
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_ls_and_validate_json(laconic: Laconic, recipe: Path) -> None:
    known = json_of(laconic("ls", "--json"))
    assert {m["name"] for m in known["methods"]} >= {"gptq", "rtn"}
    assert {s["name"] for s in known["schemes"]} >= {"W4A16", "W8A8", "FP8_DYNAMIC"}
    validated = json_of(laconic("validate", recipe, "--set", "stages.0.actorder=null", "--json"))
    assert validated["stages"][0]["group_size"] == 32
    assert validated["stages"][0]["actorder"] is None


# --- words for people ---


def test_ls_shows_one_method_scheme_or_recipe(laconic: Laconic) -> None:
    method = json_of(laconic("ls", "gptq", "--json"))
    options = {option["name"]: option for option in method["options"]}
    assert options["scheme"]["required"]
    assert options["dampening_frac"]["type"] == "number > 0 <= 1"
    assert options["dampening_frac"]["default"] == 0.01
    assert options["targets"]["default"] == ["Linear"]
    assert "dampening_frac" in laconic("ls", "gptq").out
    assert json_of(laconic("ls", "W4A16", "--json"))["weights"] == "int4, symmetric, group 128"
    assert laconic("ls", "gptq-w4a16").out == gallery()["gptq-w4a16"].read_text()


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_every_option_of_a_method_has_a_meaning(method: type[Stage]) -> None:
    options = describe(method_name(method))["options"]
    assert [option["name"] for option in options if not option["about"]] == []


def test_ls_inspect_and_validate_say_what_there_is(laconic: Laconic, artifact: Path, recipe: Path) -> None:
    assert "GPTQ" in laconic("ls").out
    assert "14 x W8A16" in laconic("inspect", artifact).out
    assert laconic("validate", recipe).out == f"{recipe}: valid, 1 stage(s): gptq\n"


def test_a_path_with_brackets_is_told_as_it_is(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out[bold][/red]"
    assert laconic("compress", recipe, "-o", out).out.startswith(f"{out}: ")


# --- the two forms of compress, and the plan ---


def test_a_model_with_a_recipe_and_a_recipe_with_a_model_are_the_same(
    laconic: Laconic, recipe: Path, llama: Path, tmp_path: Path
) -> None:
    assert laconic("compress", recipe).code == 0
    assert laconic("compress", llama, "--recipe", recipe, "-o", tmp_path / "other").code == 0
    called = library.compress(str(llama), recipe, tmp_path / "called").path
    assert weights(tmp_path / "out") == weights(tmp_path / "other") == weights(called)


def test_the_recipe_of_an_artifact_makes_it_again(laconic: Laconic, artifact: Path, tmp_path: Path) -> None:
    recorded = artifact / "recipe.yaml"
    assert laconic("validate", recorded).out == f"{recorded}: valid, 1 stage(s): rtn\n"
    ran = laconic("compress", recorded, "-o", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert weights(tmp_path / "again") == weights(artifact)


def test_a_seed_is_all_that_chance_depends_on(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert laconic("compress", recipe, "--set", f"seed={seed}", "-o", tmp_path / name).code == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_dry_run_says_what_will_be_and_writes_nothing(laconic: Laconic, recipe: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    said = laconic("compress", recipe, "--dry-run").out
    assert set(tmp_path.rglob("*")) == before
    for words in ("2 blocks", "gptq on 14 linears", "14 x W4A16", "4 x 32 tokens", "smaller", f"{tmp_path}/out"):
        assert words in said.replace("\n", "")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for its weights to outweigh the names of its tensors."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "vocab_size": 512}
    return make_model(tmp_path_factory.mktemp("roomy") / "model", **sizes)


HEAD_TOO = {"targets": ["Linear", "lm_head"], "ignore": []}


@pytest.mark.parametrize(
    "stage",
    [
        {"scheme": "W4A16"},
        {"scheme": "W4A16_ASYM", "group_size": 32},
        {"scheme": "W3A16", **HEAD_TOO},
        {"scheme": "W2A16"},
        {"scheme": "W8A16", "ignore": "re:.*down_proj"},
        {"scheme": "W8A8"},
        {"scheme": "FP8_DYNAMIC", **HEAD_TOO},
        {"scheme": "FP8_BLOCK"},
        {"scheme": "W6A6"},
    ],
    ids=lambda s: s["scheme"],
)
def test_the_size_foretold_is_the_size_that_comes(
    laconic: Laconic, roomy: Path, tmp_path: Path, stage: dict[str, Any]
) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", {"method": "rtn"} | stage, model=str(roomy))
    foretold = json_of(laconic("compress", recipe, "-o", tmp_path / "out", "--dry-run", "--json"))
    assert laconic("compress", recipe, "-o", tmp_path / "out").code == 0
    assert size(tmp_path / "out") == pytest.approx(foretold["bytes_after"], rel=0.02)
    assert size(roomy) == pytest.approx(foretold["bytes_before"], rel=0.02)


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_the_memory_foretold_is_of_the_size_that_is_taken(llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "num_attention_heads": 16}
    large = make_model(tmp_path / "large", **sizes)

    def compress(model: Path) -> Any:
        recipe = make_recipe(tmp_path / "recipe.yaml", RTN, model=str(model))
        command = [LACONIC, "compress", recipe, "-o", tmp_path / "out", "--overwrite", "--json"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    # What Python and torch take, they take for any model.
    floor, told = compress(llama)["peak_memory_bytes"], compress(large)
    taken = told["peak_memory_bytes"] - floor
    assert taken / 3 < told["forecast"]["peak_bytes"] < taken * 3


def test_a_report_that_cannot_be_written_leaves_no_folder(artifact: Path, laconic: Laconic, tmp_path: Path) -> None:
    for flags in ([], ["--json"]):
        page = tmp_path / "nope" / ("x" * 300 + ".html")
        assert "name too long" in laconic("report", artifact, "-o", page, *flags).complaint
        assert not (tmp_path / "nope").exists()


def test_a_report_does_not_take_the_place_of_another_file(artifact: Path, text: Path, laconic: Laconic) -> None:
    assert laconic("eval", artifact, "--text", text, "--context-length", "32", "--windows", "4").code == 0
    config = artifact / "config.json"
    before = config.read_text()
    ran = laconic("report", artifact, "-o", config)
    assert ran.code == 2
    assert "ends in .html" in ran.err
    assert config.read_text() == before


def test_schemes_that_vllm_has_no_kernel_for_are_told(
    llama: Path, text: Path, tmp_path: Path, laconic: Laconic
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stages: [{method: rtn, scheme: W3A16, group_size: 32}]")
    arguments = ("compress", llama, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
    ran = laconic(*arguments, "--set", "engine=vllm-cpu")
    assert ran.code == 0
    assert "vLLM 0.32, CPU does not serve W3A16 (no kernel)" in " ".join(ran.err.split())
    assert laconic(*arguments).err == ""
