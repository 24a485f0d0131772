"""What the registry promises of every method, and what it says of a class that does not keep the contract."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch

import laconic
from artifacts import quantized_linears, recipe, same_bytes
from extra_methods import allow_methods
from interruptions import Killed
from laconic.kv.format import KvFormat
from laconic.kv.shape import KvShape
from laconic.methods import METHODS
from laconic.methods.registry_check import check_methods
from laconic.stages.block import Block, BlockStage
from laconic.stages.cache import CacheStage
from laconic.stages.linear import LinearStage, LinearTask, Outcome
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Needs, Stage, example_of, method_name
from laconic.stages.survey import Figures, SurveyedBlock
from tiny import make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "mixture", "mixtral")


@pytest.mark.parametrize("kind", METHODS, ids=method_name)
def test_every_method_is_killed_and_goes_on_to_the_same_bytes(
    kind: type[Stage], llama: Path, mixture: Path, text: Path, tmp_path: Path
) -> None:
    model = mixture if method_name(kind) == "reap" else llama
    asked = recipe(example_of(kind, str(text)), text=text)
    whole = laconic.compress(str(model), asked, tmp_path / "whole")
    events: list[str] = []

    def die(event: Mapping[str, Any]) -> None:
        events.append(event["event"])
        # In the second block of a walk, or in the midst of what a stage does to the model as a whole.
        if event.get("block") == 1 or (event["event"] in ("work", "train") and events.count(event["event"]) > 1):
            raise Killed

    with pytest.raises(Killed):
        laconic.compress(str(model), asked, tmp_path / "out", report=die)
    resumed = laconic.compress(str(model), asked, tmp_path / "out")
    assert same_bytes(resumed.path, whole.path)
    assert (resumed.path / "config.json").read_bytes() == (whole.path / "config.json").read_bytes()


class Nameless(QuantizingStage, LinearStage):
    """It has no name of its own."""

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Idle(QuantizingStage, LinearStage):
    """It does nothing."""

    example: ClassVar = {"scheme": "W4A16"}
    method: Literal["idle"] = "idle"


class Misled(LinearStage):
    """Its example is none."""

    example: ClassVar = {"strenght": 2}
    method: Literal["misled"] = "misled"

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Twin(LinearStage):
    """It has the name of another."""

    method: Literal["rtn"] = "rtn"

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Needy(LinearStage):
    """Its needs are none."""

    method: Literal["needy"] = "needy"

    @property
    def needs(self) -> Any:
        return {"activations"}

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Blind(BlockStage):
    """It would be given a block without activations."""

    method: Literal["blind"] = "blind"

    @property
    def needs(self) -> Needs:
        return Needs(links=True)

    def compress(self, block: Block) -> dict[tuple[str, ...], Outcome]:
        return {}


class Aimless(LinearStage):
    """It quantizes by no scheme."""

    method: Literal["aimless"] = "aimless"

    @property
    def quantizes(self) -> bool:
        return True

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Deaf(LinearStage):
    """It takes no task."""

    method: Literal["deaf"] = "deaf"

    def compress(self) -> Outcome:  # type: ignore[override]
        raise NotImplementedError


class Surveyless(LinearStage):
    """It asks for a survey and measures nothing."""

    method: Literal["surveyless"] = "surveyless"

    @property
    def needs(self) -> Needs:
        return Needs(survey=True)

    def compress(self, task: LinearTask) -> Outcome:
        return Outcome(task.weight)


class Surveyor(Surveyless):
    """It measures the size of each weight, and how much the block's output moves without it."""

    method: Literal["surveyor"] = "surveyor"  # type: ignore[assignment]

    def survey(self, block: SurveyedBlock) -> Figures:
        return {
            n: {"size": m.weight.numel(), "change": block.output_change({n: torch.zeros_like(m.weight)})}
            for n, m in block.linears.items()
        }


class OneFormat(CacheStage):
    """It stores keys, and forgets values."""

    method: Literal["one_format"] = "one_format"

    def formats(self, shape: KvShape) -> Any:
        return KvFormat(8)


class Bits(OneFormat):
    """It says bits in place of formats."""

    method: Literal["bits"] = "bits"  # type: ignore[assignment]

    def formats(self, shape: KvShape) -> Any:
        return 8, 8


class Scopeless(Stage):
    """It is of no scope."""

    method: Literal["scopeless"] = "scopeless"


@pytest.mark.parametrize(
    ("kind", "lack"),
    [
        (Nameless, r'Nameless lacks a name: add `method: Literal\["foo"\] = "foo"`'),
        (Idle, r"Idle lacks compress\(\)"),
        (Misled, r"Misled.example is no valid instance \(strenght: Extra inputs are not permitted\)"),
        (Twin, "method 'rtn' is Rtn's already; choose another name"),
        (Scopeless, "Scopeless lacks a scope; derive it from LinearStage, BlockStage, ModelStage or CacheStage"),
        (Needy, r"Needy.needs is a set; return a laconic.stages.stage.Needs"),
        (Blind, r"Blind.needs lacks activations, which every block stage is given; begin with super\(\).needs"),
        (Aimless, r"Aimless quantizes, and proposes no scheme; derive it from QuantizingStage"),
        (Surveyless, r"Surveyless.needs declares survey; implement survey\(self, block\), or leave it out"),
        (OneFormat, r"OneFormat.needs fails: OneFormat.formats\(\) of the method 'one_format' returned KvFormat\("),
        (Bits, r"Bits.needs fails: .* returned \(8, 8\); return two laconic.kv.format.KvFormat, of keys and of values"),
        (Deaf, r"Deaf.compress\(\) has other parameters than its base: write compress\(self, task\)"),
    ],
)
def test_what_a_class_lacks_is_told_by_name(kind: type[Stage], lack: str) -> None:
    with pytest.raises(TypeError, match=rf"^methods/test_methods.py: {lack}"):
        check_methods((*METHODS, kind))


def test_any_stage_may_have_a_survey(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_methods((*METHODS, Surveyor))
    allow_methods(monkeypatch, Surveyor)
    artifact = laconic.compress(
        str(llama), recipe({"method": "surveyor", "targets": "re:.*down_proj"}, text=text), tmp_path / "out"
    )
    (figures,) = json.loads((artifact.path / "survey.json").read_text())
    assert figures.keys() == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    shape = laconic.load(artifact.path).model.layers[0].mlp.down_proj.weight.shape
    assert all(f["size"] == shape.numel() and 0 < f["change"] < 2 for f in figures.values())


@pytest.mark.parametrize(
    "kind", ["rtn", lambda task: task, METHODS[0](scheme="W8A16")], ids=["text", "lambda", "stage"]
)
def test_what_is_no_class_is_told(kind: Any) -> None:
    with pytest.raises(TypeError, match="is no class; put the class of a method into METHODS"):
        check_methods((*METHODS, kind))


def test_the_example_of_contributing_works_as_it_stands(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a method", 1)[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    file = tmp_path / "foo.py"
    file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    kind = _imported(file, monkeypatch).Foo
    check_methods((*METHODS, kind))
    allow_methods(monkeypatch, kind)
    artifact = laconic.compress(str(llama), recipe(example_of(kind, str(text)), text=text), tmp_path / "out")
    assert len(quantized_linears(laconic.load(artifact.path))) == 14


def _imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module
