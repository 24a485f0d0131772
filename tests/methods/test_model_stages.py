"""What stages that need the model whole promise: the same bytes each time, a model that transformers opens, the figures
that the papers' plain loops give, and one clear line for what cannot be done."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import laconic
from artifacts import Stage, logits, matrix_of, original, press, same_bytes, tensors, windows
from commands import Laconic
from interruptions import Killed, contents, is_whole
from laconic.checkpoint.source import build_skeleton, load_tokenizer
from laconic.methods.depth import compute_influence
from laconic.methods.llm_pruner.gradients import compute_gradients
from laconic.methods.llm_pruner.groups import find_groups
from laconic.methods.reap import compute_saliency
from laconic.pipeline.compression import compress
from laconic.runtime.reading import load
from laconic.structure.anatomy import dissect
from tiny import ARCHITECTURES, MIXTURES, SHARED, make_model, make_recipe

PRUNER: Stage = {"method": "llm_pruner", "keep_first": 1, "keep_last": 0}
STAGES: dict[str, Stage] = {
    "llm_pruner": PRUNER | {"sparsity": 0.4},
    "second": PRUNER | {"importance": "second", "aggregation": "vector", "pooling": "max"},
    "uniform": {"method": "llm_pruner", "uniform": True, "sparsity": 0.3},
    "random": PRUNER | {"importance": "random"},
    "experts": PRUNER | {"sparsity": 0.4, "groups": "mlp"},
    "uniform_experts": {"method": "llm_pruner", "uniform": True, "sparsity": 0.3},
    "hidden": {"method": "llm_pruner", "groups": "hidden", "sparsity": 0.25},
    "hidden_of_experts": {"method": "llm_pruner", "groups": "hidden", "sparsity": 0.25},
    "depth": {"method": "depth", "sparsity": 0.3},
    "reap": {"method": "reap"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama of three blocks with four key-value heads, and two mixtures."""
    folder = tmp_path_factory.mktemp("whole")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    made = {"llama": make_model(folder / "llama", num_hidden_layers=3, **heads)}
    return made | {arch: make_model(folder / arch, arch) for arch in MIXTURES}


def model_for(stage: str, models: Mapping[str, Path]) -> Path:
    return models["mixtral" if stage == "reap" or "experts" in stage else "llama"]


@pytest.fixture(scope="module", params=STAGES)
def made(
    request: pytest.FixtureRequest, models: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, laconic.Artifact]:
    """What each stage makes of its model."""
    stage = request.param
    folder = tmp_path_factory.mktemp("made") / stage
    return stage, press(model_for(stage, models), folder, STAGES[stage], text=text)


def test_a_kill_and_another_start_give_the_same_bytes(
    made: tuple[str, laconic.Artifact], models: dict[str, Path], tmp_path: Path
) -> None:
    def die(event: Mapping[str, Any]) -> None:
        if event["event"] in ("work", "step"):
            raise Killed

    stage, once = made
    model = model_for(stage, models)
    keys = {"stages": [STAGES[stage]], "calibration": once.recipe["recipe"]["calibration"]}  # type: ignore[index]
    with pytest.raises(Killed):
        compress(str(model), keys, tmp_path / "again", report=die)
    torch.manual_seed(99)
    compress(str(model), keys, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(once.path)
    assert is_whole(once.path)


def test_it_is_smaller_dense_and_opens_in_transformers(
    made: tuple[str, laconic.Artifact], models: dict[str, Path]
) -> None:
    stage, artifact = made
    opened, ours, before = original(artifact.path), laconic.load(artifact.path), original(model_for(stage, models))
    counts = [sum(p.numel() for p in m.parameters()) for m in (before, opened)]
    told = artifact.results["pruning"]
    assert counts == [told["parameters_before"], told["parameters_after"]]
    assert counts[1] < counts[0]
    assert (logits(opened) - logits(ours)).abs().max() < 0.02 * logits(ours).abs().max()
    assert opened.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    stock = type(before) is type(opened)
    assert stock == (stage not in ("llm_pruner", "second", "random", "experts"))
    # Every dtype is the source's.
    assert {t.dtype for t in tensors(artifact.path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *SHARED])
def test_transformers_computes_what_the_dense_model_does_without_these_units(arch: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", arch, num_hidden_layers=2)
    heads = PRUNER | {"groups": "attention", "importance": "random", "sparsity": 0.5}
    channels = PRUNER | {"groups": "mlp", "importance": "weight", "sparsity": 0.5}
    folder = press(source, tmp_path / "out", heads, channels).path
    # transformers has grouped products of experts in float32 at most.
    keys = {"experts_implementation": "eager"} if arch in (*MIXTURES, *SHARED) else {}
    masked, narrow = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64, **keys).eval() for f in (source, folder)
    )
    whole = build_skeleton(masked.config, torch.float64)
    anatomy, gone = dissect(whole), {"attention": 0, "mlp": 0}
    for i, groups in enumerate(find_groups(whole, anatomy)):
        for kind, part in ((g.kind, part) for g in groups for part in g.slices if part.axis == 1):
            reader = f"{anatomy.block_name(i)}.{part.linear}"
            before, after = matrix_of(masked, reader), matrix_of(narrow, reader)
            left = {tuple(column) for column in after.T.tolist()}
            dropped = [c for c, column in enumerate(before.T.tolist()) if tuple(column) not in left]
            assert before.shape[1] - len(dropped) == after.shape[1]
            before[:, dropped] = 0
            gone[kind] += len(dropped)
    assert all(gone.values())
    expected = logits(masked)
    assert (logits(narrow) - expected).abs().max() <= 1e-6 * expected.abs().max()
    made = [m.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False) for m in (masked, narrow)]
    assert torch.equal(*made)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_plain_loops(squares: bool, checkpointing: bool, models: dict[str, Path], text: Path) -> None:
    ids = windows(models["llama"], text)
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    model = load(models["llama"], dtype=torch.float64)
    blocks = list(model.get_submodule("model.layers").children())
    found = compute_gradients(model, names, ids, squares=squares, checkpointing=checkpointing, blocks=blocks)
    plain = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float64)
    each: dict[str, list[Tensor]] = {n: [] for n in names}
    for sample in ids:
        plain.zero_grad()
        out = plain(input_ids=sample[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, sample[1:]).backward()
        for n in names:
            each[n].append(plain.get_parameter(n).grad.clone())
    for n in names:
        mean, square = torch.stack(each[n]).mean(0), torch.stack(each[n]).square().mean(0)
        assert torch.allclose(found.mean[n].double(), mean, atol=1e-6 * float(mean.abs().max()), rtol=1e-5)
        if squares:
            assert torch.allclose(found.square[n].double(), square, atol=1e-6 * float(square.max()), rtol=1e-4)
    assert set(found.square) == (set(names) if squares else set())


def test_channels_that_go_are_those_the_plain_sum_likes_least(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    asked = {"method": "llm_pruner", "uniform": True, "groups": "mlp", "sparsity": 0.25}
    after = tensors(press(models["llama"], tmp_path / "out", asked, text=text).path)
    before = tensors(models["llama"])
    plain = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float64)
    ids = windows(models["llama"], text)
    for sample in ids:
        loss = plain(input_ids=sample[None], labels=sample[None]).loss / len(ids)
        loss.backward()
    for i in range(3):
        mlp = f"model.layers.{i}.mlp"
        lines = [(f"{mlp}.gate_proj.weight", 1), (f"{mlp}.up_proj.weight", 1), (f"{mlp}.down_proj.weight", 0)]
        importance = sum((plain.get_parameter(n) * plain.get_parameter(n).grad).abs().sum(axis) for n, axis in lines)
        kept = importance.argsort(descending=True)[:96].sort().values
        for n, axis in lines:
            assert torch.equal(after[n], before[n].index_select(1 - axis, kept))


def test_each_expert_loses_the_channels_that_the_plain_sum_likes_least(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    asked = {"method": "llm_pruner", "uniform": True, "groups": "mlp", "sparsity": 0.25}
    artifact = press(models["mixtral"], tmp_path / "out", asked, text=text)
    before, after = original(models["mixtral"]), original(artifact.path)
    plain = AutoModelForCausalLM.from_pretrained(models["mixtral"], dtype=torch.float64, experts_implementation="eager")
    ids = windows(models["mixtral"], text)
    for sample in ids:
        (plain(input_ids=sample[None], labels=sample[None]).loss / len(ids)).backward()
    for i in range(2):
        experts, was, now = (m.model.layers[i].mlp.experts for m in (plain, before, after))
        gate_up, down = ((p * p.grad).abs() for p in (experts.gate_up_proj, experts.down_proj))
        worth = gate_up.sum(2).view(4, 2, 128).sum(1) + down.sum(1)
        for e in range(4):
            kept = worth[e].argsort(descending=True)[:96].sort().values
            assert torch.equal(now.down_proj[e], was.down_proj[e][:, kept])
            assert torch.equal(now.gate_up_proj[e], was.gate_up_proj[e].view(2, 128, -1)[:, kept].flatten(0, 1))
    assert (after.config.model_type, after.config.intermediate_size) == ("mixtral", 96)


def test_an_expert_without_tokens_is_told(laconic: Laconic, text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral", num_local_experts=64)
    calibration = {"dataset": str(text), "num_calibration_samples": 1, "max_seq_length": 8}
    file = make_recipe(tmp_path / "recipe.yaml", PRUNER, model=str(model), calibration=calibration)
    said = laconic("compress", file, "-o", tmp_path / "out")
    assert said.code == 2
    assert re.search(
        r"no token of the calibration text was routed to model\.layers\.1\.mlp\.experts\.\d+; "
        "use more samples, or importance: weight$",
        said.err.strip(),
    )


def test_hidden_channels_that_go_are_those_the_plain_sum_likes_least(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    artifact = press(models["llama"], tmp_path / "out", STAGES["hidden"], text=text)
    before, after = tensors(models["llama"]), tensors(artifact.path)
    plain = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float64)
    ids = windows(models["llama"], text)
    for sample in ids:
        (plain(input_ids=sample[None], labels=sample[None]).loss / len(ids)).backward()
    writes = ("o_proj", "down_proj", "norm")
    importance = torch.zeros(64, dtype=torch.float64)
    for n, p in plain.named_parameters():
        changes = (p * p.grad).abs()
        importance += changes if p.dim() == 1 else changes.sum(1 if any(w in n for w in writes) else 0)
    kept = importance.argsort(descending=True)[:48].sort().values
    assert artifact.config["hidden_size"] == 48
    for n, t in before.items():
        assert torch.equal(after[n], t.index_select(0 if any(w in n for w in writes) else 1, kept)), n


def test_a_share_of_heads_and_channels_goes(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    artifact = press(models["llama"], tmp_path / "out", PRUNER | {"sparsity": 0.4}, text=text)
    before, after = tensors(models["llama"]), tensors(artifact.path)
    linears = [n for n in before if "proj" in n and "layers.0." not in n]
    gone = sum(before[n].numel() - after[n].numel() for n in linears)
    assert gone / sum(before[n].numel() for n in linears) == pytest.approx(0.4, abs=0.02)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in linears)
    for i, widths in enumerate(artifact.config["laconic_widths"]):
        heads = widths.get("num_attention_heads", 8)
        assert heads == 2 * widths.get("num_key_value_heads", 4)
        assert after[f"model.layers.{i}.self_attn.q_proj.weight"].shape == (8 * heads, 64)


def test_heads_may_be_counted(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    config = press(models["llama"], tmp_path / "out", PRUNER | {"heads": 6, "sparsity": 0.3}, text=text).config
    assert [w.get("num_attention_heads") for w in config["laconic_widths"]] == [None, 6, 6]


def test_a_narrowed_model_is_narrowed_again(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    once = press(models["llama"], tmp_path / "once", STAGES["llm_pruner"], text=text).path
    twice = press(once, tmp_path / "twice", STAGES["llm_pruner"], {"method": "depth", "blocks": 1}, text=text)
    assert len(twice.config["laconic_widths"]) == twice.config["num_hidden_layers"] == 2
    assert torch.equal(logits(original(twice.path)), logits(laconic.load(twice.path)))


def test_it_is_quantized_afterwards(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    gptq = {"method": "gptq", "scheme": "W8A16", "group_size": 8}
    dense = press(models["llama"], tmp_path / "dense", STAGES["llm_pruner"], text=text).path
    artifact = press(models["llama"], tmp_path / "out", STAGES["llm_pruner"], gptq, text=text)
    far = (logits(laconic.load(artifact.path)) - logits(laconic.load(dense))).square().mean()
    assert 0 < far < 0.1 * logits(laconic.load(dense)).square().mean()
    assert torch.allclose(logits(original(artifact.path)), logits(laconic.load(artifact.path)), atol=0.1)


def test_a_cache_has_as_many_heads_in_every_block(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    dense = press(models["llama"], tmp_path / "dense", PRUNER | {"heads": 6}, text=text).path
    with pytest.raises(ValueError, match=r"blocks of this model have 3 to 4 key-value heads, .* prune with uniform"):
        press(dense, tmp_path / "out", {"method": "kv_int8"}, text=text)
    narrow = press(models["llama"], tmp_path / "mlp", PRUNER | {"groups": "mlp"}, {"method": "kv_int8"}, text=text)
    assert laconic.load(narrow.path).generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4).shape[1] > 3


def test_influence_is_one_less_the_mean_cosine(models: dict[str, Path], text: Path) -> None:
    ids = windows(models["llama"], text)
    model = load(models["llama"], dtype=torch.float64)
    found = compute_influence(model, list(model.get_submodule("model.layers").children()), ids, batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float64)
    with torch.no_grad():
        base = plain.model
        hidden, states = base.embed_tokens(ids), []
        positions = torch.arange(ids.shape[1])[None]
        cos_sin = base.rotary_emb(hidden, positions)
        for block in base.layers:
            states.append(hidden)
            hidden = block(hidden, position_embeddings=cos_sin, position_ids=positions)
        states.append(hidden)
    for i in range(3):
        a, b = states[i].flatten(0, 1), states[i + 1].flatten(0, 1)
        expected = 1 - sum(float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)) / len(a)
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def test_blocks_of_least_influence_go(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    artifact = press(models["llama"], tmp_path / "out", {"method": "depth", "blocks": 1}, text=text)
    influence = [e["influence"] for e in artifact.log]
    (gone,) = artifact.results["pruning"]["dropped"]
    assert gone == influence.index(min(influence))
    before, after = tensors(models["llama"]), tensors(artifact.path)
    left = [i for i in range(3) if i != gone]
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(left[int(parts[2])])
        assert torch.equal(tensor, before[".".join(parts)])


def test_layer_types_go_with_their_blocks(text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gemma2", num_hidden_layers=4)
    before = original(model).config.layer_types
    artifact = press(model, tmp_path / "out", {"method": "depth", "blocks": 1}, text=text)
    (gone,) = artifact.results["pruning"]["dropped"]
    assert original(artifact.path).config.layer_types == [t for i, t in enumerate(before) if i != gone]


def test_a_block_of_each_kind_stays(text: Path, tmp_path: Path) -> None:
    # Of gemma2's four blocks two slide; of these four one does not.
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    model = make_model(tmp_path / "model", "gemma2", num_hidden_layers=4, layer_types=types)
    artifact = press(model, tmp_path / "out", {"method": "depth", "blocks": 2}, text=text)
    assert sorted(original(artifact.path).config.layer_types) == ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="one of each kind must stay, so drop at most 2"):
        press(model, tmp_path / "less", {"method": "depth", "blocks": 3}, text=text)


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_weigh_what_the_papers_sum_says(arch: str, models: dict[str, Path], text: Path) -> None:
    ids = windows(models[arch], text)
    found = compute_saliency(load(models[arch], dtype=torch.float64), ids, batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(models[arch], dtype=torch.float64, experts_implementation="eager")
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, module in plain.named_modules():
        if hasattr(module, "gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
    with torch.no_grad():
        plain(input_ids=ids)
    assert set(seen) == set(found)
    for name, (x, index, weights) in seen.items():
        experts = plain.get_submodule(name)
        for e in range(4):
            total, tokens = 0.0, 0
            for token, k in (index == e).nonzero().tolist():
                gate, up = (experts.gate_up_proj[e] @ x[token]).chunk(2)
                output = experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                total, tokens = total + float(weights[token, k] * output.norm()), tokens + 1
            assert float(found[name][e]) == pytest.approx(total / max(1, tokens), rel=1e-6)


@pytest.mark.parametrize("arch", MIXTURES)
def test_experts_that_weigh_least_go_with_their_rows(
    arch: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    artifact = press(models[arch], tmp_path / "out", {"method": "reap", "sparsity": 0.5}, text=text)
    before, after = original(models[arch]), original(artifact.path)
    assert after.config.num_experts_per_tok == before.config.num_experts_per_tok
    for i, event in enumerate(artifact.log):
        order = sorted(range(4), key=lambda e: event["saliency"][e])
        assert event["dropped"] == sorted(order[:2])
        kept = [e for e in range(4) if e not in event["dropped"]]
        mlps = [m.model.layers[i].mlp for m in (before, after)]
        assert torch.equal(mlps[1].gate.weight, mlps[0].gate.weight[kept])
        for leaf in ("gate_up_proj", "down_proj"):
            assert torch.equal(getattr(mlps[1].experts, leaf), getattr(mlps[0].experts, leaf)[kept])
    names = {
        json.dumps([n for n in sorted(t) if "experts.0" in n]) for t in map(tensors, (models[arch], artifact.path))
    }
    assert len(names) == 1


@pytest.mark.parametrize(("stage", "experts", "width"), [("reap", 3, 128), ("experts", 4, 80)])
def test_stacked_files_stay_stacked(
    stage: str, experts: int, width: int, text: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "stacked"
    make_model(folder, "mixtral")
    kept = {n: t for n, t in tensors(folder).items() if "experts" not in n}
    for name, tensor in original(folder).state_dict().items():
        if "experts" in name:
            kept[name] = tensor.clone()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    artifact = press(folder, tmp_path / "out", STAGES[stage], text=text)
    after = tensors(artifact.path)
    assert after["model.layers.1.mlp.experts.gate_up_proj"].shape == (experts, 2 * width, 64)
    assert after["model.layers.1.mlp.experts.down_proj"].shape == (experts, 64, width)
    apart = press(models["mixtral"], tmp_path / "apart", STAGES[stage], text=text)
    assert torch.equal(logits(original(artifact.path)), logits(original(apart.path)))


WRONG = [
    ("llama", {"method": "llm_pruner", "sparsity": 1}, "stages.0.sparsity should be less than 1, not 1"),
    ("llama", {"method": "llm_pruner", "sparsity": -0.1}, "stages.0.sparsity should be greater than or equal to 0"),
    (
        "llama",
        PRUNER | {"heads": 5},
        "stages.0 (llm_pruner): heads 5 cannot be divided among key-value heads, 2 to each of 4; use 4",
    ),
    (
        "llama",
        {"method": "llm_pruner", "keep_first": 2, "keep_last": 1},
        "stages.0 (llm_pruner): keep_first 2 and keep_last 1 protect all 3 blocks; lower them, or set uniform: true",
    ),
    (
        "llama",
        {"method": "llm_pruner", "groups": ["hidden", "mlp"]},
        "stages.0: a hidden channel is part of every head and MLP: give groups: [hidden] a stage of its own",
    ),
    (
        "llama",
        {"method": "llm_pruner", "groups": ["mlp", "mlp"]},
        "stages.0: groups names one twice (mlp, mlp); name each once",
    ),
    (
        "llama",
        {"method": "llm_pruner", "groups": ["heads"]},
        "stages.0.groups.0 should be 'attention', 'mlp' or 'hidden', not heads",
    ),
    (
        "llama",
        PRUNER | {"multiple_of": 129},
        "stages.0 (llm_pruner): multiple_of 129 is more than the 128 channels that there are; lower it",
    ),
    (
        "llama",
        {"method": "llm_pruner", "groups": "hidden", "multiple_of": 65},
        "stages.0 (llm_pruner): multiple_of 65 is more than the 64 channels that there are; lower it",
    ),
    (
        "llama",
        # A key-value head of four stays, of 3,072 parameters each, and 8 channels of 128, of 192 each.
        PRUNER | {"sparsity": 0.99},
        "stages.0 (llm_pruner): sparsity 0.99 cannot be reached, since a part of every group must remain; "
        "use at most 0.875",
    ),
    (
        "llama",
        {"method": "llm_pruner", "uniform": True, "sparsity": 0.99},
        "stages.0 (llm_pruner): sparsity 0.99 cannot be reached, since a part of every group must remain; "
        "use at most 0.875",
    ),
    (
        "llama",
        PRUNER | {"sparsity": 0.01},
        "stages.0 (llm_pruner): sparsity 0.01 is less than one head, or step of channels; use 0.02",
    ),
    (
        "llama",
        {"method": "llm_pruner", "groups": "hidden", "sparsity": 0.01},
        "stages.0 (llm_pruner): sparsity 0.01 is less than one head, or step of channels; use 0.0625 or more",
    ),
    (
        "llama",
        PRUNER | {"groups": "hidden"},
        "stages.0: a hidden channel reaches through all blocks; leave out keep_first and keep_last",
    ),
    (
        "llama",
        PRUNER | {"uniform": True},
        "stages.0: uniform gives all blocks the same widths; leave out keep_first and keep_last",
    ),
    (
        "llama",
        {"method": "llm_pruner", "uniform": True, "heads": 6},
        "stages.0 (llm_pruner): a stock config of 'llama' cannot have 6 heads; leave out uniform",
    ),
    (
        "mixtral",
        PRUNER | {"multiple_of": 12},
        "stages.0 (llm_pruner): multiple_of 12: transformers multiplies by experts whose width is a multiple of 8; "
        "use 16",
    ),
    (
        "llama",
        {"method": "reap"},
        "stages.0 (reap): reap drops experts, and this model has none; use llm_pruner or depth",
    ),
    (
        "mixtral",
        {"method": "reap", "sparsity": 0.75},
        "stages.0 (reap): sparsity 0.75 leaves 1 of 4 experts, and a token is routed to 2; use at most 0.5",
    ),
    (
        "llama",
        {"method": "depth"},
        "stages.0: set the number of blocks to drop: either blocks: 2 or sparsity: 0.2, and not both",
    ),
    (
        "llama",
        {"method": "depth", "sparsity": 0.1},
        "stages.0 (depth): sparsity 0.1 of 3 blocks is less than one; use blocks: 1",
    ),
    (
        "mixtral",
        {"method": "reap", "sparsity": 0.1},
        "stages.0 (reap): sparsity 0.1 of 4 experts is less than one; use 0.25 or more",
    ),
    (
        "llama",
        {"method": "depth", "blocks": 3},
        "stages.0 (depth): the model has 3 blocks, and 3 would be dropped; one at least must stay",
    ),
]


@pytest.mark.parametrize(("model", "stage", "said"), WRONG, ids=[said[:40] for _, _, said in WRONG])
def test_what_cannot_be_done_is_told_in_one_line(
    laconic: Laconic, models: dict[str, Path], text: Path, tmp_path: Path, model: str, stage: Stage, said: str
) -> None:
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    file = make_recipe(tmp_path / "recipe.yaml", stage, model=str(models[model]), calibration=calibration)
    # If the recipe itself is wrong, its file is named first.
    assert laconic("compress", file, "-o", tmp_path / "out").complaint.removeprefix(f"{file}: ").startswith(said)
    assert {f.name for f in tmp_path.iterdir()} == {"recipe.yaml"}


def test_attention_that_cannot_be_narrowed_is_told(laconic: Laconic, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "falcon", num_hidden_layers=3, alibi=True, multi_query=False)
    file = make_recipe(tmp_path / "recipe.yaml", PRUNER | {"importance": "random"}, model=str(model))
    said = laconic("compress", file, "-o", tmp_path / "out").complaint
    assert said == (
        "stages.0 (llm_pruner): the attention of 'falcon' cannot be made narrower: a part of it computes something "
        "else, or no config key sets its width; set groups: [mlp]"
    )
    assert laconic("compress", file, "-o", tmp_path / "out", "--set", "stages.0.groups=mlp").code == 0
    assert original(tmp_path / "out").config.laconic_base == "falcon"


def test_heads_that_only_their_own_block_can_lack_stay_in_a_stock_config(laconic: Laconic, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "opt", num_hidden_layers=3)
    stage = {"method": "llm_pruner", "uniform": True, "importance": "random", "sparsity": 0.3}
    config = press(model, tmp_path / "out", stage).config
    assert (config["model_type"], config["hidden_size"], config["num_attention_heads"]) == ("opt", 64, 4)
    assert config["ffn_dim"] < 128 * 0.7
    for keys, said in (
        (
            {"groups": "attention"},
            "a stock config of 'opt' cannot have fewer heads at this sparsity; leave out uniform",
        ),
        ({"heads": 3}, "a stock config of 'opt' cannot have 3 heads; leave out uniform"),
    ):
        file = make_recipe(tmp_path / "recipe.yaml", stage | keys, model=str(model))
        assert laconic("compress", file, "-o", tmp_path / "no").complaint.startswith(f"stages.0 (llm_pruner): {said}")


def test_hidden_channels_from_which_more_follows_are_told(laconic: Laconic, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "opt")
    stage = {"method": "llm_pruner", "groups": "hidden", "importance": "random"}
    file = make_recipe(tmp_path / "recipe.yaml", stage, model=str(model))
    said = laconic("compress", file, "-o", tmp_path / "out").complaint
    assert said == (
        "stages.0 (llm_pruner): the hidden channels of 'opt' cannot be pruned: more follows from its hidden size; "
        "set groups: [mlp], or use depth"
    )


def test_odd_heads_are_remarked_on(laconic: Laconic, models: dict[str, Path], tmp_path: Path) -> None:
    stage = PRUNER | {"importance": "random", "heads": 6}
    file = make_recipe(tmp_path / "recipe.yaml", stage, model=str(models["llama"]))
    said = laconic("compress", file, "-o", tmp_path / "out")
    assert "2 blocks have an odd number of heads or key-value heads, which vLLM cannot split over GPUs" in said.err
    assert "gives each block its own widths" in said.err


def test_the_same_seed_gives_the_same_random_choice(models: dict[str, Path], tmp_path: Path) -> None:
    stage = PRUNER | {"importance": "random", "sparsity": 0.3}
    one, two, other = (
        press(models["llama"], tmp_path / f"{i}", stage, seed=seed).path for i, seed in enumerate((0, 0, 1))
    )
    assert same_bytes(one, two)
    assert not same_bytes(one, other)


@pytest.mark.parametrize(
    ("stage", "what"),
    [("depth", "activations"), ("reap", "activations"), ("llm_pruner", "gradients"), ("uniform", "gradients"),
     ("hidden", "gradients")],
)  # fmt: skip
def test_nothing_is_chosen_by_what_is_no_number(
    laconic: Laconic, models: dict[str, Path], text: Path, tmp_path: Path, stage: str, what: str
) -> None:
    loud = original(model_for(stage, models))
    for name, parameter in loud.named_parameters():
        if ".mlp." in name and parameter.dim() > 1 and "gate.weight" not in name:
            parameter.data.fill_(3e38)
    loud.save_pretrained(tmp_path / "loud")
    load_tokenizer(model_for(stage, models)).save_pretrained(tmp_path / "loud")
    calibration = {"dataset": str(text), "num_calibration_samples": 4, "max_seq_length": 32}
    file = make_recipe(tmp_path / "recipe.yaml", STAGES[stage], model=str(tmp_path / "loud"), calibration=calibration)
    said = laconic("compress", file, "-o", tmp_path / "out").err.splitlines()[-1]
    method = STAGES[stage]["method"]
    assert said == (
        f"laconic: stages.0 ({method}): the {what} hold NaN or infinity; check the model and the calibration text"
    )
    assert not (tmp_path / "out").exists()
