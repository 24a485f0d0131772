"""A recipe with stages that need the model whole goes in steps, each an artifact that the next begins with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import laconic
from artifacts import Stage, linear_events, logits, original, recipe, rtn, tensors
from commands import Laconic
from extra_methods import allow_methods
from interruptions import Killed, contents, is_whole
from laconic.pipeline.compression import compress, prepare
from laconic.runtime.reading import load
from laconic.stages.model import ModelOutcome, ModelStage, ModelTask
from tiny import make_model, make_recipe

RTN = rtn("W8A16")
DEPTH: Stage = {"method": "depth", "blocks": 1}
SMOOTH: Stage = {"method": "smoothquant"}


class Louder(ModelStage):
    """Multiplies the last norm by `factor`, remembers that it did, and leaves a folder behind; or changes nothing."""

    method: Literal["louder"] = "louder"
    factor: float = 2.0
    after_codes: bool = False

    @property
    def accepts_codes(self) -> bool:
        return self.after_codes

    def check(self, source: Any, model: Any, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        if self.factor == 0:
            raise ValueError("a factor of 0 silences the model; use another")
        return {}

    def apply(self, task: ModelTask) -> ModelOutcome:
        (task.scratch / "begun").touch()
        (task.artifact / "notes").mkdir(exist_ok=True)
        (task.artifact / "notes" / "note.txt").write_text("louder")
        task.report({"event": "work", "done": 1, "total": 1})
        config = {"louder": self.factor, "initializer_range": None}
        if self.factor == 1:
            return ModelOutcome(None, config)
        model = load(task.folder, dtype=torch.float32)
        model.model.norm.weight.data *= self.factor
        return ModelOutcome(
            model, config, [{"event": "louder", "factor": self.factor}], {"loudness": {"is": self.factor}}
        )


@pytest.fixture
def louder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes may have `louder`, which no recipe outside of these tests knows."""

    allow_methods(monkeypatch, Louder)


pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


def dying(when: Callable[[Mapping[str, Any]], bool]) -> Callable[[Mapping[str, Any]], None]:
    def report(event: Mapping[str, Any]) -> None:
        if when(event):
            raise Killed

    return report


def test_each_step_begins_with_what_the_last_one_made(llama: Path, text: Path, tmp_path: Path) -> None:
    artifact = compress(str(llama), recipe(SMOOTH, DEPTH, RTN, text=text), tmp_path / "out")
    smooth = compress(str(llama), recipe(SMOOTH, text=text), tmp_path / "smooth").path
    shallow = compress(str(smooth), recipe(DEPTH, text=text), tmp_path / "shallow").path
    expected = compress(str(shallow), recipe(RTN), tmp_path / "expected").path
    assert is_whole(artifact.path)
    assert all(torch.equal(t, tensors(expected)[n]) for n, t in tensors(artifact.path).items())
    assert artifact.config["num_hidden_layers"] == 1
    assert torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(expected)))
    assert {f.name for f in tmp_path.iterdir()} == {"out", "smooth", "shallow", "expected"}


@pytest.mark.usefixtures("louder")
def test_a_stage_changes_weights_config_and_leaves_what_it_says(llama: Path, tmp_path: Path) -> None:
    artifact = compress(str(llama), {"stages": [{"method": "louder"}, RTN]}, tmp_path / "out")
    before, after = tensors(llama), tensors(artifact.path)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"] * 2)
    assert artifact.config["louder"] == 2
    assert "initializer_range" not in artifact.config
    assert artifact.log[0] == {"step": "1", "event": "louder", "factor": 2.0}
    assert {e.get("shard") for e in linear_events(artifact)} == {0, 1}
    assert artifact.results["loudness"] == {"is": 2.0}
    assert (artifact.path / "notes" / "note.txt").read_text() == "louder"
    assert not (artifact.path / "scratch").exists()
    assert artifact.results["compress"]["seconds"] > 0


@pytest.mark.usefixtures("louder")
def test_a_stage_that_changes_no_weight_hands_them_on(llama: Path, tmp_path: Path) -> None:
    alone = compress(str(llama), {"stages": [RTN]}, tmp_path / "alone").path
    quiet = {"method": "louder", "factor": 1.0, "after_codes": True}
    artifact = compress(str(llama), {"stages": [RTN, quiet]}, tmp_path / "out")
    assert all(torch.equal(t, tensors(alone)[n]) for n, t in tensors(artifact.path).items())
    assert artifact.config["quantization_config"] == laconic.Artifact(alone).config["quantization_config"]
    assert is_whole(artifact.path)
    assert torch.equal(logits(laconic.load(artifact.path)), logits(laconic.load(alone)))


MOMENTS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "first walk": lambda e: e.get("block") == 1,
    "model stage": lambda e: e["event"] == "work",
    "between": lambda e: e["event"] == "step" and e["step"] == 1,
    "last walk": lambda e: e["event"] == "step" and e["step"] == 2,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_in_any_step_changes_nothing(llama: Path, text: Path, tmp_path: Path, moment: str) -> None:
    asked = recipe(SMOOTH, DEPTH, RTN, text=text)
    expected = contents(compress(str(llama), asked, tmp_path / "expected").path)
    with pytest.raises(Killed):
        compress(str(llama), asked, tmp_path / "out", report=dying(MOMENTS[moment]))
    assert not (tmp_path / "out").exists()
    steps: list[Any] = []
    compress(str(llama), asked, tmp_path / "out", report=lambda e: steps.append(e["event"]))
    assert ("work" in steps) == (moment != "last walk")
    assert contents(tmp_path / "out") == expected
    assert {f.name for f in tmp_path.iterdir()} == {"out", "expected"}


def test_a_kill_in_the_middle_of_the_last_walk_changes_nothing(text: Path, tmp_path: Path) -> None:
    model = str(make_model(tmp_path / "model", num_hidden_layers=3))
    asked = recipe(DEPTH, SMOOTH, RTN, text=text)
    expected = contents(compress(model, asked, tmp_path / "expected").path)
    with pytest.raises(Killed):
        compress(model, asked, tmp_path / "out", report=dying(lambda e: e.get("block") == 1))
    assert compress(model, asked, tmp_path / "out").results["compress"]["resumed_shards"] == 1
    assert contents(tmp_path / "out") == expected


def test_what_was_begun_with_another_recipe_is_kept(laconic: Laconic, llama: Path, text: Path, tmp_path: Path) -> None:
    asked = recipe(SMOOTH, DEPTH, RTN, text=text)
    with pytest.raises(Killed):
        compress(str(llama), asked, tmp_path / "out", report=dying(MOMENTS["between"]))
    before = contents(tmp_path / "out.steps")
    other = recipe(SMOOTH | {"alpha": 0.7}, DEPTH, RTN, text=text)
    file = make_recipe(tmp_path / "other.yaml", *other.pop("stages"), model=str(llama), **other)
    said = laconic("compress", file, "-o", tmp_path / "out").complaint
    assert said == (
        f"{tmp_path}/out.steps/1 was made by another recipe (different: stages.0.alpha); finish that, choose another "
        "output, or pass --overwrite"
    )
    assert contents(tmp_path / "out.steps") == before
    assert laconic("compress", file, "-o", tmp_path / "out", "--overwrite").code == 0
    assert not (tmp_path / "out.steps").exists()


def test_a_later_stage_may_change_without_the_earlier_steps_being_done_again(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        compress(str(llama), recipe(DEPTH, RTN, text=text), tmp_path / "out", report=dying(MOMENTS["between"]))
    events: list[Any] = []
    other = recipe(DEPTH, RTN | {"scheme": "W8A8"}, text=text)
    compress(str(llama), other, tmp_path / "out", report=lambda e: events.append(e["event"]))
    assert "work" not in events
    assert is_whole(tmp_path / "out")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([RTN, DEPTH], "stages.1 (depth) changes weights, and earlier stages have quantized them; list it before them"),
        (
            [DEPTH | {"blocks": 2}],
            "stages.0 (depth): the model has 2 blocks, and 2 would be dropped; one at least must stay",
        ),
        (
            [DEPTH, RTN | {"targets": "re:.*nothing"}],
            "stages.1.targets 're:.*nothing' matches no linear of this model;",
        ),
        (
            [DEPTH, {"method": "gptq", "scheme": "W4A16", "group_size": 48}],
            "group_size 48 does not divide the 64 inputs of",
        ),
    ],
)
def test_what_cannot_work_is_told_before_any_work(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path, stages: list[Stage], said: str
) -> None:
    asked = recipe(*stages, text=text)
    file = make_recipe(tmp_path / "recipe.yaml", *asked.pop("stages"), model=str(llama), **asked)
    assert laconic("compress", file, "-o", tmp_path / "out").complaint.startswith(said)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml"}


@pytest.mark.usefixtures("louder")
def test_a_stage_says_what_it_cannot_do(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.1 \(louder\): a factor of 0 silences the model; use another"):
        prepare(str(llama), {"stages": [RTN, {"method": "louder", "factor": 0, "after_codes": True}]}, tmp_path / "out")


def test_no_text_to_calibrate_on_is_told(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    file = make_recipe(tmp_path / "recipe.yaml", DEPTH, model=str(llama), output=str(tmp_path / "out"))
    assert laconic("compress", file).complaint.startswith("depth needs calibration text: add 'calibration:")


def test_the_plan_shows_the_steps(laconic: Laconic, llama: Path, text: Path, tmp_path: Path) -> None:
    asked = recipe(SMOOTH, DEPTH, RTN, text=text)
    file = make_recipe(tmp_path / "recipe.yaml", *asked.pop("stages"), model=str(llama), **asked)
    arguments = ("compress", file, "-o", tmp_path / "out", "--dry-run")
    said = laconic(*arguments)
    for line in ("step 1", "step 2       depth on the whole model", "stage 2      rtn on 14 linears", "8 x 32 tokens"):
        assert line in said.out
    assert "sizes of rtn are those of the model before it is made smaller" in said.err
    told = json.loads(laconic(*arguments, "--json").out)
    assert told["steps"] == [["smoothquant"], ["depth"], ["rtn"]]
    assert told["schemes"] == {"W8A16": 14}
    assert not (tmp_path / "out").exists()
    done = json.loads(laconic("compress", file, "-o", tmp_path / "out", "--json").out)
    assert done["output"] == str(tmp_path / "out")


def test_a_model_stage_alone_is_a_plan_too(laconic: Laconic, llama: Path, text: Path, tmp_path: Path) -> None:
    asked = recipe(DEPTH, text=text)
    file = make_recipe(tmp_path / "recipe.yaml", *asked.pop("stages"), model=str(llama), **asked)
    arguments = ("compress", file, "-o", tmp_path / "out")
    assert "depth on the whole model" in laconic(*arguments, "--dry-run").out
    assert laconic(*arguments).code == 0
    assert original(tmp_path / "out").config.num_hidden_layers == 1


LORA: Stage = {"method": "lora", "max_steps": 1, "batch_size": 1, "max_seq_length": 32, "rank": 2}
KIVI: Stage = {"method": "kivi"}
KEPT = LORA | {"keep_adapters": True}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [KEPT, RTN],
            "stages.1 (rtn) comes after stages.0, whose adapters stay beside the weights that they were trained for; "
            "list it before that stage, or leave out keep_adapters there",
        ),
        ([KEPT, DEPTH], "stages.1 (depth) comes after stages.0, whose adapters stay beside the weights"),
        ([KEPT, LORA], "stages.1 (lora) comes after stages.0, whose adapters stay beside the weights"),
        (
            [RTN, LORA, LORA],
            "stages.2 (lora) comes after stages.1, whose adapters stay beside the weights that they were trained for; "
            "list it before that stage",
        ),
        ([RTN, LORA, RTN], "stages.2 (rtn) comes after stages.1, whose adapters stay beside the weights"),
        (
            [KIVI, DEPTH],
            "stages.1 (depth) changes the model whose cache stages.0 (kivi) looks at; list it before that stage",
        ),
        (
            [SMOOTH, KIVI, LORA],
            "stages.2 (lora) changes the model whose cache stages.1 (kivi) looks at; list it before ",
        ),
        ([KEPT, KIVI], "stages.1 (kivi) comes after stages.0, whose adapters stay beside the weights"),
    ],
    ids=lambda v: "-".join(s["method"] for s in v) if isinstance(v, list) else "",
)
def test_an_order_that_makes_no_sense(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path, stages: list[Stage], said: str
) -> None:
    stages = [s | {"data": [{"dataset": str(text)}]} if s["method"] == "lora" else s for s in stages]
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    file = make_recipe(tmp_path / "recipe.yaml", *stages, model=str(llama), calibration=calibration)
    assert laconic("compress", file, "-o", tmp_path / "out").complaint.startswith(said)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml"}


@pytest.mark.parametrize("stages", [[DEPTH], [DEPTH, RTN]], ids=["one step", "two steps"])
@pytest.mark.parametrize("what", ["a file", "a file in it", "a folder in it", "a step that is a file", "the model"])
def test_nothing_of_anybodys_goes_with_the_steps(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path, stages: list[Stage], what: str
) -> None:
    kept, model = tmp_path / "out.steps", llama
    if what == "the model":
        model = Path(shutil.copytree(llama, kept / "1"))
        (model / "recipe.yaml").write_text("{}")
    elif what == "a file":
        kept.write_text("mine")
    else:
        file = kept / {"a file in it": "thesis.txt", "a folder in it": "1/thesis.txt"}.get(what, "2")
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    recipe = make_recipe(tmp_path / "recipe.yaml", *stages, model=str(model), calibration=calibration)
    before = contents(tmp_path)
    for flags in ([], ["--overwrite"]):
        said = laconic("compress", recipe, "-o", tmp_path / "out", *flags).complaint
        assert said == (
            f"{kept}, where earlier steps are kept until the last is done, holds other files; move it away, or choose "
            "another output"
        )
        assert contents(tmp_path) == before


def test_adapters_that_were_kept_from_a_step_outlive_it(llama: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out.steps" / "2.last-good"
    kept.mkdir(parents=True)
    (kept / "adapter_config.json").write_text("{}")
    compress(str(llama), recipe(DEPTH, RTN, text=text), tmp_path / "out")
    assert [p.name for p in kept.parent.iterdir()] == ["2.last-good"]


def test_pickles_are_for_walks(laconic: Laconic, llama: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    torch.save(tensors(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    lora, walk = LORA | {"data": [{"dataset": str(text)}]}, {"method": "magnitude"}
    told = "and reads no pickle weights; convert them to safetensors first (transformers' save_pretrained writes those)"
    for stages, said in (
        ([lora], f"stages.0 (lora) needs the model whole, {told}"),
        ([walk, lora | {"loss": "kl"}], f"stages.1 (lora): loss: kl opens the original model too, {told}"),
    ):
        file = make_recipe(tmp_path / "recipe.yaml", *stages, model=str(model))
        assert laconic("compress", file, "-o", tmp_path / "out", "--allow-pickle").complaint == said
    file = make_recipe(tmp_path / "recipe.yaml", walk, lora, model=str(model))
    assert laconic("compress", file, "-o", tmp_path / "out", "--allow-pickle").code == 0


def test_an_artifact_with_a_cache_of_its_own_is_not_compressed_again(
    laconic: Laconic, llama: Path, tmp_path: Path
) -> None:
    model = compress(str(llama), recipe(KIVI), tmp_path / "kivi").path
    for stage in ({"method": "magnitude"}, LORA | {"data": [{"dataset": "a.txt"}]}):
        file = make_recipe(tmp_path / "recipe.yaml", stage, model=str(model))
        said = laconic("compress", file, "-o", tmp_path / "out").complaint
        assert said.startswith(f"{model} has a quantized cache (laconic_kv_cache in config.json)")
        assert said.endswith("; start from the model that it was made from")


def test_adapters_beside_a_model_are_left_out_with_a_warning(
    laconic: Laconic, llama: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    kept = compress(str(llama), recipe(KEPT | {"data": [{"dataset": str(text)}]}), tmp_path / "kept").path
    file = make_recipe(tmp_path / "recipe.yaml", RTN, model=str(kept))
    ran = laconic("compress", file, "-o", tmp_path / "out")
    assert ran.code == 0
    assert f"warning: the adapters in {kept}/adapter are not part of its weights, and are left out" in ran.err
