"""What every method promises, asked of each in METHODS; of caches, `test_caches` asks the rest, and of stages that need
the model whole `test_model_stages`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import laconic
from artifacts import Stage, inputs, linear_events, press, quantized_linears, same_bytes, tensors, windows
from laconic import Artifact
from laconic.formats import Quantized
from laconic.methods import METHODS
from laconic.methods.gptq import Gptq
from laconic.methods.reap import Reap
from laconic.methods.rtn import Rtn
from laconic.stages.block import BlockStage
from laconic.stages.linear import Outcome, WeightStage
from laconic.stages.model import ModelStage
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.stage import Stage as AnyStage
from laconic.walk import apply
from laconic.walk.side_tensors import attach, compress_stack
from linears import correlated, made_of, output_error, weight
from tiny import make_model

SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "W4A16_ASYM", "group_size": 32},
    {"scheme": "W3A16", "group_size": -1},
    {"scheme": "W2A16", "group_size": 16},
    {"scheme": "W8A8"},
    {"scheme": "W6A6"},
    {"scheme": "FP8"},
    {"scheme": "NVFP4"},
    {"scheme": "NVFP4A16"},
    {"scheme": "MXFP4A16"},
]


# What any quantizing method may keep beside its codes.
BESIDE: list[dict[str, Any]] = [
    {"scheme": "W4A16", "group_size": 32, "outlier_ratio": 0.05},
    {"scheme": "W4A16_ASYM", "group_size": 32, "low_rank": 4},
    {"scheme": "W6A6", "outlier_ratio": 0.05, "low_rank": 4},
    {"scheme": "W8A8", "dynamic": False, "outlier_ratio": 0.05},
    {"scheme": "NVFP4A16", "outlier_ratio": 0.05, "low_rank": 4},
    {"scheme": "NVFP4", "outlier_ratio": 0.05},
    {"scheme": "MXFP4A16", "low_rank": 4},
    {"scheme": "W4A4", "group_size": 32, "low_rank": 4, "rotate_inputs": True},
]


# One of each kind of grid and of what is kept beside: what else a scheme is, formats and files see, and not the method.
KINDS: list[dict[str, Any]] = [
    {"scheme": "W4A16", "group_size": 32},
    {"scheme": "W4A16_ASYM", "group_size": 32, "low_rank": 4},
    {"scheme": "W8A8", "dynamic": False, "outlier_ratio": 0.05},
    {"scheme": "FP8"},
    {"scheme": "NVFP4A16", "outlier_ratio": 0.05, "low_rank": 4},
]


# What stages that need the model whole are given, for a model of two blocks. Data is that of the test.
_TRAINING = {"data": [{"dataset": "text.txt"}], "rank": 2, "max_steps": 2, "batch_size": 2, "max_seq_length": 32}
OF_MODELS: dict[str, Stage] = {
    "llm_pruner": {"keep_first": 1, "keep_last": 0},
    "depth": {"blocks": 1},
    "lora": _TRAINING,
    "qlora": _TRAINING,
}


def stages_of(method: type[AnyStage]) -> list[Stage]:
    """A method with several schemes, where it has schemes, and GPTQ with all."""
    name = {"method": method.model_fields["method"].default}
    if issubclass(method, ModelStage):
        return [name | OF_MODELS.get(name["method"], {})]
    if not issubclass(method, QuantizingStage):
        # Ranges of groups of tokens want samples of a group at least.
        return [name | ({"group_size": 16} if name["method"] == "kvquant" else {})]
    if "threshold" in method.model_fields:
        return [name | {"threshold": 2.5}, name | {"scheme": "W8A8", "outlier_ratio": 0.05, "low_rank": 4}]
    if "iters" in method.model_fields:
        name |= {"iters": 3, "batch_size": 2}
    return [name | scheme for scheme in ((*SCHEMES, *BESIDE) if method is Gptq else KINDS)]


def told(stage: Stage) -> str:
    return "-".join(str(v) for v in stage.values())


EVERY = [stage for method in METHODS if issubclass(method, WeightStage) for stage in stages_of(method)]
BY_NAME = {method.model_fields["method"].default: method for method in METHODS}

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.model_fields["method"].default)


def made(stage: Stage) -> AnyStage:
    return BY_NAME[stage["method"]].model_validate(stage)


@pytest.fixture(scope="module", params=EVERY, ids=told)
def stage(request: pytest.FixtureRequest) -> Stage:
    return request.param


@pytest.fixture(scope="module")
def artifact(stage: Stage, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return press(llama, tmp_path_factory.mktemp("artifacts") / told(stage), stage, text=text)


@pytest.fixture(scope="module")
def again(
    stage: Stage, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, list[Tensor]]:
    """Made once more after other random numbers, and the weights that were chosen."""
    chosen = list[Tensor]()

    def watched(choose: Callable[..., list[Outcome]]) -> Callable[..., list[Outcome]]:
        def choose_and_keep(*args: Any, **named: Any) -> list[Outcome]:
            outcomes = choose(*args, **named)
            weights = [outcome.weight for outcome in outcomes]
            chosen.extend(w.decode() if isinstance(w, Quantized) else w for w in weights)
            return outcomes

        return choose_and_keep

    torch.manual_seed(1234)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "compress_stack", watched(compress_stack))
        patch.setattr(apply, "attach", watched(attach))
        return press(llama, tmp_path_factory.mktemp("again") / "out", stage, text=text), chosen


def test_the_same_seed_gives_the_same_bytes(artifact: Artifact, again: tuple[Artifact, list[Tensor]]) -> None:
    assert same_bytes(again[0].path, artifact.path)


@every_method
def test_the_number_of_threads_changes_nothing(
    method: type[AnyStage], llama: Path, text: Path, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    model = make_model(tmp_path / "mixture", "mixtral") if method is Reap else llama
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    stage = stages_of(method)[0]
    stage |= {"data": [{"dataset": str(text)}]} if "data" in stage else {}
    folders, products = [], []
    for threads in (1, 2):
        set_threads(threads)
        folders.append(press(model, tmp_path / str(threads), stage, text=text).path)
        products.append(x.T @ x)
    if not torch.equal(*products):
        pytest.skip("a matrix product depends on the number of threads here")
    assert same_bytes(*folders)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_untargeted_weights_are_left_as_they_were(stage: Stage, llama: Path, text: Path, tmp_path: Path) -> None:
    targeted = stage | {"targets": "re:.*layers.1.mlp.*"}
    before, after = tensors(llama), tensors(press(llama, tmp_path / "part", targeted, text=text).path)
    # A method that moves scales changes the norm before the linears too.
    moves = isinstance(config := made(stage), BlockStage) and config.needs.links
    untouched = [n for n in before if ("layers.1." if moves else ".1.mlp.") not in n]
    assert set(after) >= set(untouched)
    for name in untouched:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))


def test_the_file_decodes_to_what_was_chosen(artifact: Artifact, again: tuple[Artifact, list[Tensor]]) -> None:
    made, chosen = again
    found = linears_in(made.path, [e["linear"] for e in linear_events(artifact)])
    assert torch.equal(torch.cat([w.flatten() for w in found]), torch.cat([w.flatten() for w in chosen]))


def linears_in(folder: Path, names: list[str]) -> list[Tensor]:
    """Weights as the file has them, decoded, in float32."""
    model = laconic.load(folder)
    decoded = {n: linear.decode(torch.float32) for n, linear in quantized_linears(model).items()}
    return [decoded[n] if n in decoded else model.get_submodule(n).weight.float() for n in names]


def test_the_log_tells_the_errors_that_the_file_has(artifact: Artifact, llama: Path, text: Path) -> None:
    names = [e["linear"] for e in linear_events(artifact)]
    before, after = linears_in(llama, names), linears_in(artifact.path, names)
    # A linear was observed after the ones before it were compressed, as it is in the finished model.
    seen = inputs(laconic.load(artifact.path), windows(llama, text), names)
    for event, W, Q in zip(linear_events(artifact), before, after, strict=True):
        if event["method"] in ("awq", "smoothquant"):
            continue  # What they round is not the weight as it was, but scaled.
        E, X = (W - Q).double(), seen[event["linear"]]
        W = W.double()
        assert event["weight_error"] == pytest.approx(float(E.square().sum() / W.square().sum()), rel=1e-4)
        if "output_error" in event:
            lost, kept = ((X @ M.T).square().sum() for M in (E, W))
            assert event["output_error"] == pytest.approx(float(lost / kept), rel=0.02)


@pytest.mark.parametrize("looking", [s for s in EVERY if isinstance(made(s), Gptq)], ids=told)
def test_a_method_that_looks_at_data_beats_rounding_to_nearest(looking: Stage) -> None:
    x, W = correlated(), weight()
    blind = Rtn.model_validate(looking | {"method": "rtn", "observer": "mse"})
    assert output_error(W, made_of(made(looking), W, x), x) < 0.9 * output_error(W, made_of(blind, W, x), x)


@every_method
def test_a_config_is_frozen_and_knows_all_its_keys(method: type[AnyStage]) -> None:
    given = stages_of(method)[0]
    config = method.model_validate(given)
    with pytest.raises(ValidationError, match="frozen"):
        config.method = "another"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        method.model_validate(given | {"grup_size": 32})
    assert method.model_validate(config.model_dump()) == config
