"""Whatever a user gets wrong is told in one line that names the fix, with exit code 2, and leaves no trace."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, T5Config, ViTConfig

from commands import Laconic
from tiny import make_model, make_recipe, make_text

RTN = {"method": "rtn", "scheme": "W8A16"}
GPTQ = {"method": "gptq", "scheme": "W4A16", "group_size": 32}
LLM_INT8 = {"method": "llm_int8"}
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"

Damage = Callable[[Path], Any]
Refused = Callable[..., str]


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def refused(laconic: Laconic, llama: Path, tmp_path: Path) -> Refused:
    """Compress in earnest and on trial; both are refused alike, and change nothing.

    Returns what was said, without the name of the recipe's file, with which it begins if the recipe itself is wrong.
    """

    def run(*stages: dict[str, Any], model: Path | str = llama, flags: tuple[str, ...] = (), **keys: Any) -> str:
        keys = {"output": str(tmp_path / "out")} | keys
        recipe = make_recipe(tmp_path / "recipe.yaml", *stages or [RTN], model=str(model), **keys)
        before = contents(tmp_path)
        on_trial, in_earnest = (laconic("compress", recipe, *flags, *more).complaint for more in (["--dry-run"], []))
        assert contents(tmp_path) == before
        assert on_trial == in_earnest
        return in_earnest.removeprefix(f"{recipe}: ")

    return run


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- what the recipe asks of the model ---


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            [GPTQ | {"group_size": 48}],
            f"group_size 48 does not divide the 64 inputs of {Q}; "
            "use group_size: auto, one of 64, 32, -1, or ignore it",
        ),
        (
            [{"method": "rtn", "scheme": "FP8_BLOCK"}],
            f"FP8_BLOCK rounds activations in groups of 128, which does not divide the 64 inputs of {Q}; "
            "use FP8_DYNAMIC, or ignore it",
        ),
        (
            [RTN | {"targets": "re:.*qproj"}],
            "stages.0.targets 're:.*qproj' matches no linear of this model; did you mean 're:.*q_proj'?",
        ),
        (
            [RTN | {"targets": ["Linear", "re:.*experts"]}],
            "stages.0.targets 're:.*experts' matches no linear of this model; its linears end in down_proj, ",
        ),
        (
            [RTN | {"ignore": "re:.*"}],
            "stages.0 ignores every linear that it targets; nothing would be compressed",
        ),
        (
            [RTN, RTN | {"targets": "re:.*down_proj"}],
            "stages.1 (rtn) would quantize model.layers.0.mlp.down_proj a second time; "
            "narrow its targets, or add the linear to the ignore of one stage",
        ),
        (
            [RTN | {"targets": "re:.*q_proj"}],
            f"linears that read one input must share a scheme, since engines fuse them ({Q}: W8A16, {K}: 16 bit, ",
        ),
        (
            [RTN | {"targets": ["Linear"], "ignore": ["re:.*k_proj"]}, {**GPTQ, "targets": "re:.*k_proj"}],
            f"linears that read one input must share a scheme, since engines fuse them ({Q}: W8A16, {K}: W4A16, ",
        ),
        (
            [RTN | {"low_rank": 33}],
            f"low_rank 33 is more than 32, the rank of {K} itself; lower it, or ignore it",
        ),
        ([RTN | {"low_rank": -1}], "stages.0.low_rank should be greater than or equal to 0, not -1"),
        ([RTN | {"outlier_ratio": 1}], "stages.0.outlier_ratio should be less than 1, not 1"),
        ([GPTQ | {"outlier_ratio": -0.1}], "stages.0.outlier_ratio should be greater than or equal to 0, not -0.1"),
        ([LLM_INT8 | {"threshold": 0}], "stages.0.threshold should be greater than 0, not 0"),
        ([LLM_INT8 | {"threshold": float("inf")}], "stages.0.threshold should be a finite number, not .inf"),
        ([LLM_INT8 | {"scheme": "W4A16"}], "stages.0.scheme should be 'W8A8', not W4A16"),
        ([LLM_INT8 | {"group_size": 32}], "stages.0: W8A8 has no groups: leave group_size out"),
        ([{"method": "wanda", "sparsity": 1}], "stages.0.sparsity should be less than 1, not 1"),
        ([{"method": "wanda", "sparsity": -0.1}], "stages.0.sparsity should be greater than or equal to 0, not -0.1"),
        (
            [{"method": "sparsegpt", "sparsity": 0.6, "mask_structure": "2:4"}],
            "stages.0: mask_structure '2:4' is a sparsity of 0.5, not 0.6; leave sparsity out, or choose another ",
        ),
        (
            [GPTQ | {"sparsity": 0.25, "mask_structure": "2:4"}],
            "stages.0: mask_structure '2:4' is a sparsity of 0.5, not 0.25; leave sparsity out, or choose another ",
        ),
        (
            [{"method": "magnitude", "mask_structure": "two of four"}],
            "stages.0: unknown mask_structure 'two of four': write unstructured, N:M as in 2:4, or RxC as in 16x16",
        ),
        (
            [{"method": "magnitude", "mask_structure": "4:4"}],
            "stages.0: mask_structure '4:4' should keep at least one and less than all, as 2:4 does",
        ),
        (
            [{"method": "magnitude", "mask_structure": "3:5"}],
            f"stages.0 (magnitude): mask_structure '3:5' does not divide the 64 inputs of {Q}; use another structure ",
        ),
        (
            [{"method": "magnitude", "mask_structure": "5x4"}],
            f"stages.0 (magnitude): mask_structure '5x4' does not divide the 64 outputs of {Q}; use another structure ",
        ),
        (
            [{"method": "magnitude", "ratios": {"re:.*attn": 0.3, "re:.*down_prj": 0.2}}],
            "stages.0.ratios 're:.*down_prj' matches none of the linears of this stage; did you mean 're:.*down_proj'?",
        ),
        (
            [{"method": "magnitude", "ratios": {"re:.*attn": 1.0}}],
            "stages.0.ratios: the sparsity of 're:.*attn' should be at least 0 and less than 1, not 1",
        ),
        (
            [{"method": "magnitude", "ratios": {"re:.*": 0.3, "re:.*mlp.*": 0.2}}],
            "stages.0.ratios 're:.*mlp.*' never counts, since patterns before it fit all that it fits, and the first ",
        ),
        ([{"method": "magnitude", "ratios": {3: 0.5}}], "stages.0.ratios: a key should be a word, not 3"),
        ([{"method": "magnitude", "ratios": [0.5]}], "stages.0.ratios should hold keys and values"),
        (
            [{"method": "wanda", "targets": "lm_head", "ignore": [], "allocation": "owl"}],
            "stages.0.allocation looks at linears in blocks, and lm_head is in none; leave allocation out",
        ),
        (
            [{"method": "magnitude", "targets": "re:.*mlp.*", "protect": {"dataset": "a.txt", "heads": 0.5}}],
            "stages.0.protect leaves attention heads whole, and the stage prunes no linear of attention; leave it out",
        ),
        (
            [{"method": "magnitude", "ratios": {"re:(": 0.5}}],
            "stages.0.ratios: 're:(' is not a regular expression: ",
        ),
        (
            [{"method": "wanda", "mask_structure": "2:4", "allocation": "owl"}],
            "stages.0: allocation gives linears sparsities of their own, and mask_structure '2:4' fixes that of all; ",
        ),
        (
            [{"method": "wanda", "ratios": {"re:.*attn": 0.3}, "allocation": "owl"}],
            "stages.0: ratios and allocation both set the sparsity of each linear; leave one of them out",
        ),
        (
            [{"method": "wanda", "sparsity": 0.1, "allocation": "owl"}],
            "stages.0: owl_lambda 0.08 may take a block's sparsity 0.16 from the mean, 0.1, and so out of 0 to 1; ",
        ),
        (
            [{"method": "autoround", "scheme": "W4A16", "asymmetric": True}],
            "stages.0: 'asymmetric' is now called 'asymmetric_calibration'; rename the key",
        ),
        (
            [{"method": "gptq", "scheme": "W4A16", "asymmetric": 1.0}],
            "stages.0: 'asymmetric' is now called 'asymmetric_calibration'; rename the key",
        ),
        (
            [{"method": "magnitude", "protect": {"dataset": "a.txt", "heads": 1.5}}],
            "stages.0.protect.heads should be less than 1, not 1.5",
        ),
        (
            [{"method": "magnitude", "protect": {"dataset": "a.txt", "heads": 0.5, "splits": "test"}}],
            "unknown key 'stages.0.protect.splits'; did you mean 'split'?",
        ),
        (
            [{"method": "magnitude", "mask_structure": "32x1", "protect": {"dataset": "a.txt", "heads": 0.5}}],
            "stages.0.protect: mask_structure '32x1' does not divide a head of 16 channels; use another structure, ",
        ),
        (
            [{"method": "magnitude", "protect": {"dataset": "gone.txt", "heads": 0.5, "max_seq_length": 64}}],
            "no text file 'gone.txt'; check the path",
        ),
        (
            [{"method": "magnitude", "protect": {"dataset": "gone.txt", "heads": 0.5}}],
            "stages.0.protect.max_seq_length 512 is longer than the model's context of 256; lower it",
        ),
        (
            [{"method": "magnitude"}, RTN | {"low_rank": 4}],
            f"stages.1 (rtn) adds a low_rank product to {Q}, "
            "which magnitude has pruned: none of its zeros would remain",
        ),
        (
            [GPTQ | {"sparsity": 0.5, "low_rank": 4}],
            "stages.0: low_rank adds values where pruned weights are zero; leave it out, or sparsity",
        ),
        (
            [GPTQ | {"mask_structure": "2:4", "outlier_ratio": 0.1}],
            "stages.0: outlier_ratio adds values where pruned weights are zero; leave it out, or sparsity",
        ),
        (
            [RTN, {"method": "magnitude"}],
            "stages.1 (magnitude) changes weights, and earlier stages have quantized all that it targets; list it ",
        ),
    ],
)
def test_what_the_model_has_not_or_cannot_take(refused: Refused, stages: list[dict[str, Any]], expected: str) -> None:
    assert refused(*stages).startswith(expected)


def test_a_head_that_is_tied_to_the_embeddings(refused: Refused, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tied=True)
    said = refused(RTN | {"targets": ["Linear", "lm_head"], "ignore": []}, model=tied)
    assert said == (
        "stages.0 targets lm_head, which shares its weight with the embeddings; put it in ignore, or give Embedding a "
        "stage of rtn, which unties the two"
    )


# --- the command line ---


def test_a_model_without_a_recipe(laconic: Laconic, llama: Path) -> None:
    said = laconic("compress", llama).complaint
    assert said == f"'{llama}' is no recipe file; to compress a model by a ready recipe add --recipe NAME"


def test_a_recipe_without_a_model_or_an_output(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    said = laconic("compress", recipe, "-o", tmp_path / "out").complaint
    assert said == "no model: name one on the command line, or as 'model' in the recipe"
    said = laconic("compress", llama, "--recipe", recipe).complaint
    assert said == "no output: give --output DIR, or 'output' in the recipe"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compress", "gone.yaml"], "no recipe file 'gone.yaml'; check the path, or name one of: "),
        (["compress", "m", "--recipe", "gptq-w4a61"], "no recipe 'gptq-w4a61'; did you mean 'gptq-w4a16'?"),
        (["validate", "awq"], "no recipe 'awq'; the gallery has "),
        (["validate", "rtn-w4a16", "--set", "seed"], "--set seed: write it as key.path=value, for instance "),
        (["compres"], "No such command 'compres'. Did you mean 'compress'?"),
        (["compress"], "Missing argument 'RECIPE.yaml | MODEL'; see '"),
        (["ls", "rtn", "awq"], "Got unexpected extra argument(s) (awq); see '"),
        (["ls", "gtpq"], "no method, scheme or recipe 'gtpq'; did you mean 'gptq'?"),
        (["ls", "--jsn"], "No such option: --jsn"),
        (["eval", "m", "--windows", "0"], "Invalid value for '--windows': "),
        (["eval", "m", "--dtype", "int8"], "--dtype int8 is not one of float32, bfloat16, float16"),
        (["eval", "gone"], "no model folder 'gone'; give a folder with config.json, or a Hub name like owner/model"),
        (["inspect", "gone"], "no model folder 'gone'; give a folder with config.json, or a Hub name like owner/model"),
        (["eval", "/etc"], "/etc/config.json is missing; is /etc a Hugging Face model folder?"),
        (["inspect", "gone/model"], "'gone/model' is no local folder and could not be fetched from the Hub; check "),
        (["report", "gone"], "gone is no artifact: it has no config.json"),
    ],
)
def test_a_wrong_command(laconic: Laconic, arguments: list[str], expected: str) -> None:
    assert laconic(*arguments).complaint.startswith(expected)


# --- the model ---


def config(**changes: Any) -> Damage:
    """Change keys of config.json."""

    def damage(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def replace(name: str, content: str | bytes | None = None) -> Damage:
    """Give a file other content, or take it away."""

    def damage(model: Path) -> None:
        if content is None:
            (model / name).unlink()
        else:
            (model / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Change the tensors of the only weights file."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def index(weight_map: Any) -> Damage:
    """Give the weights an index."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


WEIGHT = f"{Q}.weight"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (replace("config.json"), "{m}/config.json is missing; is {m} a Hugging Face model folder?"),
        (replace("config.json", "{"), "{m}/config.json is not valid JSON ("),
        (replace("config.json", b"\xff\xfe"), "{m}/config.json is not valid JSON ("),
        (replace("config.json", "[]"), "{m}/config.json holds no keys and values; download it again"),
        (replace("config.json", "{}"), "{m}/config.json does not describe a model transformers knows: "),
        (config(model_type="lama"), "{m}/config.json does not describe a model transformers knows: "),
        (config(hidden_size="wide"), "{m}/config.json does not describe a model transformers knows: "),
        (config(hidden_act="gelo"), "config.json describes no llama that can be built: "),
        (config(num_hidden_layers=0), "unsupported architecture 'LlamaForCausalLM': found no list of decoder blocks "),
        (config(num_hidden_layers=3), "{m} has no tensor 'model.layers.2."),
        (
            config(vocab_size=256),
            "tensor 'model.embed_tokens.weight' has shape (128, 64), config.json says (256, 64); ",
        ),
        (
            config(auto_map={"AutoConfig": "configuration.Own"}),
            "{m} wants to run its own code (auto_map); pass --trust-remote-code if you trust it",
        ),
        (
            config(quantization_config={"quant_method": "bitsandbytes"}),
            "{m} is already quantized (bitsandbytes); start from the original 16-bit model",
        ),
        (
            config(quantization_config={"quant_method": "awq"}),
            "config.json of {m} says that the model is quantized by 'awq', but none of its tensors is; download it ",
        ),
        (
            replace("model.safetensors"),
            "{m} has no model.safetensors or model.safetensors.index.json; is it a Hugging ",
        ),
        (replace("model.safetensors", b""), "{m}/model.safetensors cannot be read ("),
        (weights(lambda t: t.clear()), "{m} holds no weights; Laconic reads bf16, fp16 or fp32 weights"),
        (weights(lambda t: t.pop(WEIGHT)), f"{{m}} has no tensor '{WEIGHT}', which config.json asks for; "),
        (
            weights(lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n]),
            "{m} has no tensor 'model.layers.1.self_attn.q_proj.weight', which config.json asks for; download it again",
        ),
        (
            weights(lambda t: t.update({WEIGHT: t[WEIGHT][:32].clone()})),
            f"tensor '{WEIGHT}' has shape (32, 64), config.json says (64, 64); the checkpoint and its config.json do ",
        ),
        (
            weights(lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)})),
            f"tensor '{WEIGHT}' is I8; Laconic reads bf16, fp16 or fp32 weights",
        ),
        (
            weights(lambda t: t.update({n: w.to(torch.int8) for n, w in t.items()})),
            "{m} holds weights in I8; Laconic reads bf16, fp16 or fp32 weights",
        ),
        (
            index({WEIGHT: "model-1.safetensors", "b": "model-2.safetensors"}),
            "{m}/model-2.safetensors is missing, though the index names it; download it again",
        ),
        (
            index({WEIGHT: "model-1.safetensors", "lost": "model-1.safetensors"}),
            "{m}/model.safetensors.index.json names tensor 'lost', which no file holds; download it again",
        ),
        (
            index({WEIGHT: "../recipe.yaml"}),
            "{m}/model.safetensors.index.json points outside the folder, to '../recipe.yaml'; do not trust this ",
        ),
        (
            index({WEIGHT: "/etc/hostname"}),
            "{m}/model.safetensors.index.json points outside the folder, to '/etc/hostname'; do not trust this ",
        ),
        (index({WEIGHT: "config.json"}), "{m}/config.json cannot be read ("),
        (index({WEIGHT: ["model-1.safetensors"]}), "{m}/model.safetensors.index.json has no weight_map of tensors to "),
        (index(None), "{m}/model.safetensors.index.json has no weight_map of tensors to files; download it again"),
    ],
)
def test_a_damaged_model(refused: Refused, model: Path, damage: Damage, expected: str) -> None:
    damage(model)
    assert refused(model=model).startswith(expected.format(m=model))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: Path) -> Path:
    """The tiny Llama, brought along as code of its own."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config(model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)(model)
    replace("own.py", OWN_CODE)(model)
    return model


def test_a_models_own_code_is_run_only_when_asked(
    laconic: Laconic, refused: Refused, own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    told = f"{own_code} wants to run its own code (auto_map); pass --trust-remote-code if you trust it"
    assert refused(model=own_code) == told
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    ran = laconic("compress", own_code, "--recipe", recipe, "-o", tmp_path / "out", "--trust-remote-code")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out" / "own.py").read_text() == OWN_CODE
    assert "rtn" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "inspect OWN",
        "eval text OWN --text TEXT --context-length 32 --windows 2",
        "eval domains OWN a=TEXT --context-length 32 --windows 2",
        "eval long OWN --measure memory --lengths 64",
        "bench sparsity OWN --measure models --prompt 8 --rounds 3",
        "profile generate OWN --prompt 4 --tokens 2 --trace OWN/trace.json",
        "sweep STUDY -o OWN/sweep --dry-run",
    ],
)
def test_every_command_that_opens_a_model_runs_its_code_only_when_asked(
    laconic: Laconic, own_code: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    evaluation = {"text": str(text), "context_length": 32, "windows": 2}
    study = {
        "base": {"model": str(own_code), "stages": [RTN]},
        "evaluations": [evaluation],
        "axes": [{"key": "seed", "values": [0, 1]}],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    places = {"OWN": str(own_code), "TEXT": str(text), "STUDY": str(tmp_path / "study.yaml")}
    arguments = re.sub("OWN|TEXT|STUDY", lambda name: places[name[0]], command).split()
    told = f"{own_code} wants to run its own code (auto_map); pass --trust-remote-code if you trust it"
    assert laconic(*arguments).complaint == told
    ran = laconic(*arguments, "--trust-remote-code")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("kept", [7, 0.5, 0.999])
def test_a_truncated_file(refused: Refused, model: Path, kept: float) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    said = refused(model=model)
    assert said.startswith(f"{file} cannot be read (")
    assert said.endswith("); it may be truncated: download it again")


@pytest.mark.parametrize("kind", [BertConfig, T5Config, ViTConfig])
def test_an_architecture_that_is_no_causal_language_model(
    refused: Refused, model: Path, kind: type[AutoConfig]
) -> None:
    kind(num_hidden_layers=2).save_pretrained(model)
    said = refused(model=model)
    assert said == f"unsupported architecture '{kind.model_type}': it is no causal language model"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_loses_no_earlier_output(
    laconic: Laconic, llama: Path, model: Path, tmp_path: Path, poison: float
) -> None:
    weights(lambda t: t["model.layers.1.mlp.up_proj.weight"][5].fill_(poison))(model)
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN, model=str(model), output=str(tmp_path / "out"))
    told = (
        f"tensor 'model.layers.1.mlp.up_proj.weight' in {model}/model.safetensors holds NaN or infinity; "
        "the checkpoint is damaged"
    )
    assert laconic("compress", recipe).complaint == told
    assert not (tmp_path / "out").exists()
    assert laconic("compress", llama, "--recipe", recipe, "-o", tmp_path / "out", "--overwrite").code == 0
    good = contents(tmp_path / "out")
    assert laconic("compress", recipe, "--overwrite").complaint == told
    assert contents(tmp_path / "out") == good


# --- pickles ---


@pytest.fixture
def pickled(model: Path) -> Path:
    """The tiny Llama as a pickle."""
    file = model / "model.safetensors"
    torch.save(load_file(file), model / "pytorch_model.bin")
    file.unlink()
    return model


def test_pickles_are_refused_unless_allowed(refused: Refused, pickled: Path) -> None:
    assert refused(model=pickled) == (
        f"{pickled} holds pickle weights, which can run code when opened; "
        "convert them to safetensors, or pass --allow-pickle if you trust them"
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_allowed_pickles_give_what_safetensors_give(
    laconic: Laconic, llama: Path, pickled: Path, tmp_path: Path, indexed: bool
) -> None:
    if indexed:
        (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-1.bin")
        weight_map = dict.fromkeys(load_file(llama / "model.safetensors"), "pytorch_model-1.bin")
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    recipe = make_recipe(tmp_path / "recipe.yaml", RTN)
    before = contents(pickled)
    for source, output in ((llama, "a"), (pickled, "b")):
        ran = laconic("compress", source, "--recipe", recipe, "-o", tmp_path / output, "--allow-pickle")
        assert ran.code == 0, ran.err
    assert contents(pickled) == before
    of_safetensors, of_pickle = (sorted((tmp_path / o).glob("*.safetensors")) for o in "ab")
    assert [f.read_bytes() for f in of_safetensors] == [f.read_bytes() for f in of_pickle]


def test_an_original_in_pickles_is_measured_only_when_allowed(
    laconic: Laconic, llama: Path, pickled: Path, text: Path
) -> None:
    arguments = ("eval", "text", llama, "--baseline", pickled, "--text", text, "--context-length", 32, "--windows", 2)
    assert laconic(*arguments).complaint.startswith(f"{pickled} holds pickle weights, which can run code when opened; ")
    ran = laconic(*arguments, "--allow-pickle", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["kl_mean"] == 0


class Attack:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": Attack()}, "cannot be read as plain tensors; it is damaged, or holds code"),
        ([torch.zeros(1)], "holds something other than named tensors; save the model's state_dict alone"),
        (
            {"model": {"w": torch.zeros(1)}},
            "holds something other than named tensors; save the model's state_dict alone",
        ),
    ],
)
def test_a_pickle_that_is_more_than_tensors(refused: Refused, pickled: Path, content: Any, expected: str) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    assert refused(model=pickled, flags=("--allow-pickle",)) == f"{pickled}/pytorch_model.bin {expected}"


# --- calibration ---


def test_a_method_that_needs_text_and_gets_none(refused: Refused) -> None:
    fix = "needs calibration text: add 'calibration: {dataset: FILE_OR_HUB_NAME}' to the recipe"
    assert refused(GPTQ) == f"gptq {fix}"
    assert refused({"method": "rtn", "scheme": "FP8"}) == f"static activations {fix}"
    assert refused(LLM_INT8) == f"llm_int8 {fix}"
    assert refused({"method": "wanda"}) == f"wanda {fix}"
    assert refused({"method": "magnitude", "allocation": "owl"}) == f"allocation: owl {fix}"
    assert refused(RTN | {"outlier_ratio": 0.01}) == f"outlier_ratio {fix}"


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        ({"dataset": "{t}/gone.txt"}, "no text file '{t}/gone.txt'; check the path"),
        (
            {"dataset": "{t}/short.txt"},
            "the calibration text has 40 tokens, less than one sample of 64; give more text or ",
        ),
        (
            {"dataset": "{t}/empty.txt"},
            "the calibration text has 0 tokens, less than one sample of 64; give more text or ",
        ),
        ({"dataset": "{t}/bad.jsonl"}, "{t}/bad.jsonl, line 2, is not JSON: "),
        ({"dataset": "{t}/bad.parquet"}, "{t}/bad.parquet is not a readable Parquet file: "),
        ({"dataset": "no/such-dataset"}, "dataset 'no/such-dataset' is no local file and could not be fetched from "),
        (
            {"dataset": "{t}/short.txt", "max_seq_length": 512},
            "calibration.max_seq_length 512 is longer than the model's context of 256; lower it",
        ),
    ],
)
def test_calibration_text_that_will_not_do(
    refused: Refused, tmp_path: Path, calibration: dict[str, Any], expected: str
) -> None:
    (tmp_path / "short.txt").write_text(make_text(40))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    calibration = {"max_seq_length": 64} | calibration
    calibration["dataset"] = calibration["dataset"].format(t=tmp_path)
    assert refused(GPTQ, calibration=calibration).startswith(expected.format(t=tmp_path))


def test_a_model_without_its_tokenizer(refused: Refused, model: Path, text: Path) -> None:
    calibration = {"dataset": str(text), "max_seq_length": 64}
    (model / "tokenizer.json").write_text("{")
    said = refused(GPTQ, model=model, calibration=calibration)
    assert said.startswith(f"the tokenizer in {model} cannot be opened: ")
    for file in model.glob("*token*"):
        file.unlink()
    said = refused(GPTQ, model=model, calibration=calibration)
    assert said == f"{model} has no tokenizer (tokenizer.json); copy the original model's tokenizer files there"


def test_a_tokenizer_of_another_model(refused: Refused, tmp_path: Path, text: Path) -> None:
    small = make_model(tmp_path / "small", vocab_size=20)
    said = refused(GPTQ, model=small, calibration={"dataset": str(text), "max_seq_length": 64})
    assert said.endswith("the model knows 20; copy the original model's tokenizer files there")


@pytest.mark.parametrize(
    "stage",
    [
        GPTQ,
        {"method": "rtn", "scheme": "FP8"},
        {"method": "awq", "scheme": "W8A16"},
        {"method": "smoothquant"},
        {"method": "zeroquant", "scheme": "W8A8", "iters": 2},
        {"method": "autoround", "scheme": "W8A16", "iters": 2},
        {"method": "autoround", "scheme": "W8A16", "iters": 2, "asymmetric_calibration": False},
    ],
    ids=lambda s: s["method"],
)
def test_activations_that_overflow(laconic: Laconic, tmp_path: Path, text: Path, stage: dict[str, Any]) -> None:
    loud = make_model(tmp_path / "loud", dtype=torch.float16)
    weights(lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(60000))(loud)
    calibration = {"dataset": str(text), "num_calibration_samples": 2, "max_seq_length": 64}
    recipe = make_recipe(tmp_path / "recipe.yaml", stage, model=str(loud), calibration=calibration)
    said = laconic("compress", recipe, "-o", tmp_path / "out").complaint
    assert re.fullmatch(
        r"model\.layers\.[01]: the activations hold NaN or infinity; check the model and the calibration text, or save "
        r"the model in bfloat16 and compress that \(float16 ends at 65504\)",
        said,
    )
    assert not (tmp_path / "out").exists()


def test_the_output_of_the_last_block_that_overflows(laconic: Laconic, tmp_path: Path, text: Path) -> None:
    """No stage reads it."""
    loud = make_model(tmp_path / "loud", dtype=torch.float16)
    weights(lambda t: t["model.layers.1.mlp.down_proj.weight"].fill_(60000))(loud)
    calibration = {"dataset": str(text), "num_calibration_samples": 2, "max_seq_length": 64}
    recipe = make_recipe(tmp_path / "recipe.yaml", GPTQ, model=str(loud), calibration=calibration)
    said = laconic("compress", recipe, "-o", tmp_path / "out").complaint
    fix = "or save the model in bfloat16 and compress that (float16 ends at 65504)"
    assert said == f"model.layers.1: its output holds NaN or infinity, {fix}"


def test_fewer_samples_than_asked_are_used_with_a_warning(laconic: Laconic, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(make_text(200))
    calibration = {"dataset": str(tmp_path / "short.txt"), "num_calibration_samples": 9, "max_seq_length": 51}
    recipe = make_recipe(tmp_path / "recipe.yaml", GPTQ, model=str(llama), calibration=calibration)
    ran = laconic("compress", recipe, "-o", tmp_path / "out")
    assert ran.code == 0
    assert ran.err == "warning: the calibration text fills 4 of 9 samples; using those\n"


# --- the output ---


def test_an_output_that_is_there_already(refused: Refused, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    assert refused() == f"output {out} exists; choose another name, or pass --overwrite"
    told = f"output {out} is no artifact, so --overwrite leaves it alone; choose another name"
    assert refused(flags=("--overwrite",)) == told


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("recipe.yaml", "output {t}/recipe.yaml is a file; choose another name"),
        (
            "recipe.yaml/a/b",
            "output {t}/recipe.yaml/a/b cannot be made: {t}/recipe.yaml is no folder that you may write to",
        ),
        ("model", "output {t}/model is the model's own folder, or holds it; choose another"),
        ("model/../model/.", "output {t}/model is the model's own folder, or holds it; choose another"),
        ("", "output {t} is the model's own folder, or holds it; choose another"),
        ("begun", "{t}/begun.partial, where the work would go on, is something else; move it away"),
    ],
)
def test_a_place_that_will_not_do(refused: Refused, model: Path, tmp_path: Path, output: str, expected: str) -> None:
    (tmp_path / "begun.partial").mkdir()
    (tmp_path / "begun.partial" / "thesis.txt").touch()
    assert refused(model=model, output=f"{tmp_path}/{output}").startswith(expected.format(t=tmp_path))
    assert refused(model=model, output=f"{tmp_path}/{output}", flags=("--overwrite",)).startswith(
        expected.format(t=tmp_path)
    )


def test_a_folder_that_may_not_be_written(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    told = f"output {tmp_path}/out cannot be made: {tmp_path} is no folder that you may write to"
    assert refused() == told


# --- what eval is asked for ---


def test_tasks_without_lm_eval(laconic: Laconic, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "laconic.evaluation.lm", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = laconic("eval", "tasks", llama, "arc_easy").complaint
    assert said.startswith("tasks are measured by lm-eval, which cannot be imported (")
    assert said.endswith("); pip install 'laconic[eval]'")
