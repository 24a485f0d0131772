"""Recovery from recipe to file: what is trained, merged, kept, resumed and refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import laconic
from artifacts import Stage, linear_events, logits, original, press, rtn, same_bytes, tensors, tokens
from laconic.artifact.size import measure_size
from laconic.checkpoint.source import load_tokenizer
from laconic.data.mix import TextSource, collate, read_mix
from laconic.runtime.adapters import read_adapter
from laconic.train import finetune as loop
from laconic.train.finetune import TrainingArguments
from laconic.train.losses import language_loss
from tiny import make_model, make_text

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of each row set to zero, but for the linears of the MLP's end, which stay whole."""
    folder = tmp_path_factory.mktemp("models") / "pruned"
    model = original(dense)
    for name, parameter in model.named_parameters():
        if "proj" in name and "down" not in name:
            W = parameter.data
            W[W.abs() <= W.abs().float().median(1, keepdim=True).values] = 0
    model.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(make_text(3000))
    rows = [{"instruction": make_text(9, seed=i), "output": make_text(9, seed=i + 99)} for i in range(20)]
    (folder / "b.json").write_text(json.dumps(rows))
    return [
        {"dataset": str(folder / "a.txt"), "weight": 3},
        {"dataset": str(folder / "b.json"), "format": "instruction", "weight": 1},
    ]


def recover(texts: list[dict[str, Any]], method: str = "lora", **keys: Any) -> Stage:
    few = {
        "rank": 4,
        "alpha": 8,
        "learning_rate": 2e-2,
        "max_steps": 4,
        "batch_size": 4,
        "max_seq_length": 32,
        "eval_every": 2,
        "save_every": 2,
        "held_out_samples": 4,
    }
    return {"method": method, "data": texts} | few | keys


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_it_lowers_the_held_out_loss_and_keeps_every_zero(
    method: str, pruned: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    artifact = press(pruned, tmp_path / "a", recover(texts, method))
    told = artifact.results[f"training-{method}"]
    losses = [m["loss"] for m in told["held_out"]]
    assert [m["step"] for m in told["held_out"]] == [0, 2, 4]
    assert losses[-1] < 0.97 * losses[0]
    assert [c["step"] for c in told["curve"]] == [1, 2, 3, 4]
    assert [d["share"] for d in told["data"]] == [0.75, 0.25]
    before, after = tensors(pruned), tensors(artifact.path)
    assert before.keys() == after.keys()
    for name, W in before.items():
        changed = after[name] != W
        assert after[name].dtype == W.dtype
        assert changed.any() == ("proj" in name)
        assert (after[name][W == 0].view(torch.int16) == 0).all()
    assert (before["model.layers.0.self_attn.q_proj.weight"] == 0).float().mean() > 0.45


def test_merged_weights_compute_what_was_measured(pruned: Path, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    """The last held-out loss is that of the file, but for the rounding of merged weights to 16 bit."""
    artifact = press(pruned, tmp_path / "a", recover(texts))
    parts = [TextSource(**t) for t in texts]
    tokenizer = load_tokenizer(pruned)
    mix = read_mix(parts, tokenizer, length=32, held_out=0.05, held_out_samples=4, seed=0)
    ids, loss_mask = collate(mix.held_out)
    model = original(artifact.path, torch.float32)
    with torch.no_grad():
        mean = float(language_loss(model, ids, loss_mask)) / sum(e.targets for e in mix.held_out)
    assert mean == pytest.approx(artifact.results["training-lora"]["held_out"][-1]["loss"], rel=2e-3)


def test_kept_adapters_are_pefts_and_leave_the_weights_alone(
    pruned: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    artifact = press(pruned, tmp_path / "a", recover(texts, keep_adapters=True))
    before, after = tensors(pruned), tensors(artifact.path)
    assert all(torch.equal(after[n], before[n]) for n in before)
    theirs = peft.PeftModel.from_pretrained(original(artifact.path, torch.float32), artifact.path / "adapter")
    ids = tokens()
    changed = logits(theirs, ids)
    assert not torch.allclose(changed, logits(original(pruned, torch.float32), ids), atol=0.05)
    ours = original(pruned, torch.float32)
    state, scale = read_adapter(artifact.path / "adapter")
    for name in {n.rpartition(".")[0] for n in state}:
        ours.get_submodule(name).weight.data += scale * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
    assert torch.allclose(changed, logits(ours, ids), atol=1e-3)
    # What is loaded and measured is what is served: the adapter is applied, and its bytes count.
    assert torch.allclose(changed, logits(laconic.load(artifact.path, dtype=torch.float32), ids), atol=1e-5)
    alone = laconic.load(artifact.path, dtype=torch.float32, adapter=False)
    assert torch.equal(logits(alone, ids), logits(original(pruned, torch.float32), ids))
    size, before_size = measure_size(artifact.path), measure_size(pruned)
    nbytes = sum(t.nbytes for t in state.values())
    assert (size.adapter_bytes, size.tensor_bytes) == (nbytes, before_size.tensor_bytes + nbytes)
    assert size.file_bytes > before_size.file_bytes + nbytes


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_beside_codes_adapters_are_kept(
    method: str, scheme: str, dense: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    stages = [rtn(scheme, **({"group_size": 32} if scheme == "W4A16" else {})), recover(texts, method)]
    artifact = press(dense, tmp_path / "a", *stages)
    alone = press(dense, tmp_path / "b", stages[0])
    assert same_bytes(artifact.path, alone.path)
    assert (artifact.path / "adapter" / "adapter_config.json").exists()
    losses = [m["loss"] for m in artifact.results[f"training-{method}"]["held_out"]]
    assert losses[-1] < 0.97 * losses[0]
    assert {e["method"] for e in linear_events(artifact)} == {"rtn"}


def test_an_adapter_beside_codes_is_applied_when_they_are_loaded(
    dense: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = press(dense, tmp_path / "a", rtn("W4A16", group_size=32), recover(texts)).path
    theirs = original(folder, torch.float32)
    bare = logits(theirs)  # decodes the weights, without which peft finds none
    served = logits(peft.PeftModel.from_pretrained(theirs, folder / "adapter"))
    assert not torch.allclose(served, bare, atol=0.1)
    assert torch.equal(logits(laconic.load(folder, dtype=torch.float32)), served)


def test_recovered_and_then_quantized(pruned: Path, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    stages = [recover(texts), rtn("W4A16", group_size=32)]
    artifact = press(pruned, tmp_path / "a", *stages)
    merged = press(pruned, tmp_path / "b", stages[0])
    quantized = press(merged.path, tmp_path / "c", stages[1])
    assert same_bytes(artifact.path, quantized.path)
    assert "training-lora" in artifact.results
    assert not (tmp_path / "a.steps").exists()


class Killed(BaseException):
    """What ends a run in the middle, as a signal would."""


@pytest.mark.parametrize("keys", [{}, {"dropout": 0.2, "gradient_accumulation": 2, "gradient_checkpointing": True}])
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_comes_to_the_same_bytes(
    keys: dict[str, Any], after: int, pruned: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    stage = recover(texts, batch_size=2) | keys
    whole = press(pruned, tmp_path / "whole", stage)

    def kill(event: Mapping[str, Any]) -> None:
        if event.get("event") == "train" and event["step"] == after:
            raise Killed

    given = {"stages": [stage]}
    with pytest.raises(Killed):
        laconic.compress(str(pruned), given, tmp_path / "again", report=kill)
    seen: list[int] = []
    again = laconic.compress(str(pruned), given, tmp_path / "again", report=lambda e: seen.append(e.get("step", 0)))
    assert 1 + after // 2 * 2 in seen
    assert (1 in seen) == (after == 1)
    assert same_bytes(again.path, whole.path)
    for key in ("curve", "held_out", "best_step"):
        assert again.results["training-lora"][key] == whole.results["training-lora"][key]


def test_changed_data_is_not_gone_on_with(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(make_text(2000))
    given = {"stages": [recover([{"dataset": str(file)}])]}

    def kill(event: Mapping[str, Any]) -> None:
        if event.get("step") == 3:
            raise Killed

    with pytest.raises(Killed):
        laconic.compress(str(pruned), given, tmp_path / "a", report=kill)
    file.write_text(make_text(2000, seed=1))
    with pytest.raises(ValueError, match=r"begun with another recipe \(different: texts.stages.0.data\)"):
        laconic.compress(str(pruned), given, tmp_path / "a")


def test_it_stops_early_and_keeps_the_best(
    pruned: Path, texts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the third step on uphill, a little at a time.
    monkeypatch.setattr(TrainingArguments, "learning_rate_at", lambda self, step: 1e-2 if step < 2 else -3e-3)
    keys = {"max_steps": 9, "eval_every": 1, "patience": 2}
    artifact = press(pruned, tmp_path / "a", recover(texts, **keys))
    told = artifact.results["training-lora"]
    losses = {m["step"]: m["loss"] for m in told["held_out"]}
    assert told["best_step"] == min(losses, key=lambda s: losses[s]) == 2
    assert (told["steps"], told["stopped_early"]) == (4, True)
    monkeypatch.setattr(TrainingArguments, "learning_rate_at", lambda self, step: 1e-2)
    best = press(pruned, tmp_path / "b", recover(texts, **keys | {"max_steps": 2}))
    assert same_bytes(artifact.path, best.path)


def test_what_never_gets_better_is_left_as_it_was(pruned: Path, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    artifact = press(pruned, tmp_path / "a", recover(texts, learning_rate=50.0, max_grad_norm=None, warmup=0))
    assert artifact.results["training-lora"]["best_step"] == 0
    before, after = tensors(pruned), tensors(artifact.path)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_loss_that_turns_nan_ends_it_and_the_last_good_adapters_are_kept(
    pruned: Path, texts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = loop._Trainer._loss

    def breaking(*args: Any) -> Tensor:
        lost = calm(*args)
        broken[0] += torch.is_grad_enabled()
        return lost * float("nan") if broken[0] == 4 else lost

    broken = [0]
    monkeypatch.setattr(loop._Trainer, "_loss", breaking)
    with pytest.raises(ValueError, match="NaN") as told:
        press(pruned, tmp_path / "a", recover(texts))
    kept = tmp_path / "a.last-good"
    assert str(told.value) == (
        f"stages.0 (lora): the loss turned NaN or infinite in step 4; the adapters of step 2 are kept in {kept}: lower "
        f"learning_rate (0.02), set start: {kept} to go on from them, and pass --overwrite"
    )
    monkeypatch.setattr(loop._Trainer, "_loss", calm)
    # What is kept is what a run of two steps would have come to; and training goes on from it.
    monkeypatch.setattr(TrainingArguments, "learning_rate_at", lambda self, step: 1e-2 * (step + 1))
    stage = recover(texts, start=str(kept), max_steps=1)
    artifact = laconic.compress(str(pruned), {"stages": [stage]}, tmp_path / "a", overwrite=True)
    held = artifact.results["training-lora"]["held_out"]
    begun = laconic.compress(str(pruned), {"stages": [recover(texts, max_steps=2)]}, tmp_path / "b")
    assert held[0]["loss"] < begun.results["training-lora"]["held_out"][0]["loss"]


def test_distilled_it_comes_nearer_to_its_teacher(
    pruned: Path, dense: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    keys = {"loss": "kl", "max_steps": 8, "learning_rate": 5e-3, "eval_every": 8}
    artifact = press(pruned, tmp_path / "a", recover(texts, teacher=str(dense), **keys))
    held = [m["loss"] for m in artifact.results["training-lora"]["held_out"]]
    assert held[-1] < 0.9 * held[0]
    # Left to itself it looks to the recipe's original, from which it does not differ yet.
    alone = press(pruned, tmp_path / "b", recover(texts, **keys | {"max_steps": 1}))
    assert alone.results["training-lora"]["held_out"][0]["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"targets": "re:.*qproj"},
            "targets 're:.*qproj' matches no linear of this model; did you mean 're:.*q_proj'?",
        ),
        ({"rank": 999}, "rank 999 is more than 64, the rank of model.layers.0.self_attn.q_proj itself; lower it"),
        ({"max_seq_length": 999}, "max_seq_length 999 is longer than the model's context of 256; lower it"),
        ({"batch_size": 999}, "sequences to train on, less than one batch of 999 (batch_size x gradient_accumulation"),
        ({"data": []}, "stages.0.data should have at least one item"),
        ({"data": [{"dataset": "gone.txt"}]}, "no text file 'gone.txt'; check the path"),
        ({"data": [{"dataset": "a.txt", "weight": 0}]}, "stages.0.data.0.weight should be greater than 0, not 0"),
        ({"data": [{"dataset": "a.txt", "wieght": 1}]}, "unknown key 'stages.0.data.0.wieght'; did you mean 'weight'?"),
        ({"teacher": "."}, "teacher goes with loss: kl; set that, or leave it out"),
        ({"loss": "kl", "teacher": "no/where/at all"}, "no model folder 'no/where/at all'"),
        (
            {"start": "nowhere"},
            "nowhere holds no LoRA adapter (adapter_model.safetensors, adapter_config.json); name a",
        ),
        ({"learning_rate": math.inf}, "stages.0.learning_rate should be a finite number, not .inf"),
        ({"weight_decay": math.inf}, "stages.0.weight_decay should be a finite number, not .inf"),
        (
            {"data": [{"dataset": "a.txt", "weight": math.inf}]},
            "stages.0.data.0.weight should be less than or equal to 1000000, not .inf",
        ),
        ({"patience": 1, "held_out": 0}, "patience counts measurements of the held-out loss; set held_out, or leave "),
        ({"method": "lora", "learning_rate": 0}, "stages.0.learning_rate should be greater than 0, not 0"),
    ],
)
def test_wrong_input_is_named_with_its_fix(
    keys: dict[str, Any], expected: str, pruned: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"\S") as told:
        press(pruned, tmp_path / "a", recover(texts, **keys))
    assert expected in str(told.value)
    assert not list(tmp_path.iterdir())


_LAUNCHED = """
import json, sys
import laconic
model, recipe, output = sys.argv[1:]
laconic.compress(model, json.loads(recipe), output)
"""


@pytest.mark.slow
def test_two_processes_come_to_what_one_does_with_twice_the_batch(
    pruned: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "launched.py").write_text(_LAUNCHED)
    stages = [recover(texts, batch_size=2), rtn("W4A16", group_size=32)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    given = [str(tmp_path / "launched.py"), str(pruned), json.dumps({"stages": stages, "device": "cpu"})]
    ran = subprocess.run([*launch, *given, str(tmp_path / "two")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = laconic.Artifact(tmp_path / "two")
    one = press(pruned, tmp_path / "one", recover(texts, batch_size=4), stages[1])
    told = [a.results["training-lora"] for a in (one, two)]
    assert [t["processes"] for t in told] == [1, 2]
    assert told[0]["data"] == told[1]["data"]
    for key in ("curve", "held_out"):
        losses = [[m["loss"] for m in t[key]] for t in told]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not (tmp_path / "two.steps").exists()


def test_a_tokenizer_of_another_model(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match=r"gives token \d+, the model knows 20; copy the original model's tokenizer"):
        press(small, tmp_path / "a", recover(texts))
    assert not (tmp_path / "a.partial").exists()


@pytest.mark.parametrize(
    ("loss", "whose"), [("lm", "the model and the data"), ("kl", "the model, the teacher and the")]
)
def test_a_model_that_computes_no_number_is_not_the_learning_rates_fault(
    dense: Path, texts: list[dict[str, Any]], tmp_path: Path, loss: str, whose: str
) -> None:
    loud = original(dense)
    for parameter in loud.model.layers[0].mlp.parameters():
        parameter.data.fill_(3e38)
    loud.save_pretrained(tmp_path / "loud")
    load_tokenizer(dense).save_pretrained(tmp_path / "loud")
    told = rf"^stages.0 \(lora\): the loss is NaN or infinite before anything is trained; check {whose}"
    for held_out in (0.05, 0):
        with pytest.raises(ValueError, match=told):
            press(tmp_path / "loud", tmp_path / f"{held_out}", recover(texts, loss=loss, held_out=held_out))


def test_good_adapters_that_cannot_be_kept_hide_no_loss(
    pruned: Path, texts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, seen = loop._Trainer._loss, [0]

    def breaking(*args: Any) -> Tensor:
        seen[0] += torch.is_grad_enabled()
        return calm(*args) * (float("nan") if seen[0] == 4 else 1)

    monkeypatch.setattr(loop._Trainer, "_loss", breaking)
    (tmp_path / "a.last-good").write_text("mine")
    with pytest.raises(ValueError, match="NaN or infinite in step 4; the adapters of step 2 could not be kept in"):
        press(pruned, tmp_path / "a", recover(texts))
    assert (tmp_path / "a.last-good").read_text() == "mine"


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_state_is_told(pruned: Path, texts: list[dict[str, Any]], tmp_path: Path, left: int) -> None:
    given = {"stages": [recover(texts)]}

    def kill(event: Mapping[str, Any]) -> None:
        if event.get("step") == 3:
            raise Killed

    with pytest.raises(Killed):
        laconic.compress(str(pruned), given, tmp_path / "a", report=kill)
    (state,) = (tmp_path / "a.partial").rglob("training.pt")
    state.write_bytes(state.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"training.pt is damaged; delete it, and run the same command"):
        laconic.compress(str(pruned), given, tmp_path / "a")
    state.unlink()
    again = laconic.compress(str(pruned), given, tmp_path / "a")
    assert same_bytes(again.path, press(pruned, tmp_path / "b", recover(texts)).path)


def test_a_finished_training_is_not_taken_for_one_on_other_data(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(make_text(2000))
    given = {"stages": [recover([{"dataset": str(file)}]), rtn("W8A16")]}

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            raise Killed

    with pytest.raises(Killed):
        laconic.compress(str(pruned), given, tmp_path / "a", report=kill)
    file.write_text(make_text(2000, seed=1))
    with pytest.raises(ValueError, match=r"steps/1 was made by another recipe \(different: texts.stages.0.data\)"):
        laconic.compress(str(pruned), given, tmp_path / "a")


def test_adapters_of_another_shape_are_no_start(pruned: Path, texts: list[dict[str, Any]], tmp_path: Path) -> None:
    kept = press(pruned, tmp_path / "kept", recover(texts, keep_adapters=True)).path / "adapter"
    wide = make_model(tmp_path / "wide", num_hidden_layers=1, intermediate_size=256)
    for model, keys in ((wide, {}), (pruned, {"rank": 2, "alpha": 4})):
        with pytest.raises(ValueError, match=r"are of other linears, or not of rank \d; set targets and rank as they"):
            press(model, tmp_path / "a", recover(texts, start=str(kept), **keys))
    assert not (tmp_path / "a.partial").exists()
    (kept / "adapter_config.json").write_text('{"r": "four"}')
    with pytest.raises(ValueError, match="does not say 'r' and 'lora_alpha' of an adapter"):
        press(pruned, tmp_path / "a", recover(texts, start=str(kept)))


def test_training_goes_on_from_adapters_of_a_model_that_was_cut_before(
    texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Of the cut model's shape, which is not that of the original."""
    model, depth = make_model(tmp_path / "model"), {"method": "depth", "blocks": 1}
    text = Path(texts[0]["dataset"])
    kept = press(model, tmp_path / "kept", depth, recover(texts, keep_adapters=True), text=text).path / "adapter"
    again = press(model, tmp_path / "again", depth, recover(texts, start=str(kept)), text=text)
    losses = [laconic.Artifact(p).results["training-lora"]["held_out"] for p in (kept.parent, again.path)]
    assert losses[1][0]["loss"] < losses[0][0]["loss"]
    with pytest.raises(ValueError, match="are of other linears, or not of rank 4"):
        press(model, tmp_path / "whole", recover(texts, start=str(kept)))
