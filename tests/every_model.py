"""One tiny model of a model type through methods, a cache and an evaluation, each result checked against transformers.

A step *works* if its result was compared and is equal or near; it is *refused* if Laconic raised one line of its own;
anything else is a *fault*. `check` never raises.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import laconic
from interruptions import Killed, contents
from laconic.evaluation.options import TextOptions
from laconic.evaluation.through_cache import step
from laconic.structure.anatomy import compute_head_input, dissect
from laconic.structure.calls import embed_ids, record_calls
from laconic.structure.hooks import capture_inputs
from shrunk import make_shrunk, open_in_transformers
from tiny import VOCABULARY

WORKS, REFUSED, FAULT, NOT_TRIED = "works", "refused", "fault", "not tried"
STEPS = ("stream", "rtn", "gptq", "awq", "smoothquant", "cache", "eval")

_RTN = {"method": "rtn", "scheme": "W4A16", "group_size": 16}
_METHODS: dict[str, list[dict[str, Any]]] = {
    "rtn": [_RTN],
    "gptq": [{"method": "gptq", "scheme": "W4A16", "group_size": 16}],
    "awq": [{"method": "awq", "scheme": "W8A16", "unlinked": "skip", "search_tokens": 64}],
    "smoothquant": [{"method": "smoothquant"}, {"method": "rtn", "scheme": "W8A16"}],
    "cache": [{"method": "kivi", "k_bits": 8, "v_bits": 8, "group_size": 16, "residual_length": 32}],
}
# In float32 only the order of sums differs; eight bits of a weight, or of a key, change little.
_EQUAL, _NEAR = 1e-4, 0.3


class Differs(Exception):
    """A result was compared, and is another."""


class Refused(Exception):
    """Laconic refused the recipe in one line of its own, and wrote nothing."""


class NotTried(Exception):
    """transformers itself cannot do what a step would compare with."""


@dataclass
class Report:
    """What became of each step of a model type.

    Attributes:
        model_type: of transformers.
        model_class: the class by which transformers opens it.
        results: the result of each step, and the reason of a refusal or a fault.
        opens: whether transformers opens the rtn artifact itself: `yes`, or the reason why not; warned says whether
            `laconic.plan` says so before the run.
    """

    model_type: str
    model_class: str = ""
    results: dict[str, tuple[str, str]] = field(default_factory=dict)
    opens: str = ""

    def to_json(self) -> str:
        return json.dumps(vars(self))


def check(model_type: str, folder: Path, text: Path, steps: tuple[str, ...] = STEPS) -> Report:
    """Take a tiny model of this type through the steps, in a folder that is emptied afterwards."""
    report = Report(model_type)
    try:
        source = make_shrunk(folder / "source", model_type)
        config = json.loads((source / "config.json").read_text())
        report.model_class = next(iter(config.get("architectures") or []), "")
        original = open_in_transformers(source)
        _logits(original)
        _logits(open_in_transformers(source, dtype="auto"))
    except (Exception, SystemExit) as e:
        report.results = dict.fromkeys(steps, (NOT_TRIED, f"no tiny model: {_line(e)}"))
        return report
    expected = _logits(original)
    for name in steps:
        report.results[name] = _outcome(lambda name=name: _STEPS[name](source, folder / name, text, expected, report))  # type: ignore[misc]
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _outcome(run: Callable[[], None]) -> tuple[str, str]:
    try:
        run()
    except Refused as e:
        return REFUSED, str(e)
    except NotTried as e:
        return NOT_TRIED, str(e)
    except Exception as e:
        return FAULT, _line(e)
    return WORKS, ""


def _line(e: BaseException) -> str:
    frames = traceback.extract_tb(e.__traceback__)
    ours = next((f for f in reversed(frames) if "/laconic/" in f.filename), frames[-1])
    shown = [f"{Path(f.filename).name}:{f.lineno}" for f in ([ours] if ours == frames[-1] else [ours, frames[-1]])]
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]} ({', '.join(shown)})"


def _compress(method: str, source: Path, output: Path, text: Path, **keys: Any) -> Path:
    stages = _METHODS[method]
    if keys.pop("auto", False):
        stages = [stage | ({"group_size": "auto"} if "group_size" in stage else {}) for stage in stages]
    recipe = {
        "stages": stages,
        "calibration": {
            "dataset": str(text),
            "num_calibration_samples": 8,
            "max_seq_length": 32,
            "batch_size": 2,
            "moe_calibrate_all_experts": True,
        },
    }
    try:
        return laconic.compress(str(source), recipe, output, **keys).path
    except (ValueError, OSError) as e:
        own = "/laconic/" in traceback.extract_tb(e.__traceback__)[-1].filename
        if output.exists() or not own or "\n" in str(e):
            raise
        if "does not divide" in str(e) and "auto" in str(e) and method != "cache":
            return _compress(method, source, output, text, auto=True, **keys)
        raise Refused(str(e)) from e


def _stream(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
    """Run blocks alone, on calls that were recorded for calibration, and compare with the whole model."""
    try:
        ours, theirs = laconic.load(source), open_in_transformers(source, dtype="auto")
    except ValueError as e:
        raise Refused(str(e)) from e
    dtypes = {n: p.dtype for n, p in theirs.named_parameters()}
    others = [n for n, p in ours.named_parameters() if dtypes.get(n, p.dtype) != p.dtype]
    if others:
        raise Differs(f"{others[0]} has another dtype than in transformers")
    model = laconic.load(source, dtype=torch.float32)
    _compare(_logits(model), expected, _EQUAL, "laconic.load and transformers read the model differently")
    try:
        anatomy = dissect(model)
    except ValueError as e:
        raise Refused(str(e)) from e
    if anatomy.obstacle:
        raise Refused(f"blocks {anatomy.obstacle}")
    ids = torch.cat([_tokens(), _tokens().flip(0, 1)[:1]])
    calls = record_calls(model, anatomy.blocks, ids, 1e9)
    hidden = embed_ids(model, anatomy.blocks, ids)
    with torch.no_grad():
        for i, call in enumerate(calls):
            block = model.get_submodule(anatomy.block_name(i))
            hidden = torch.cat([call(block, hidden[s], s) for s in (slice(0, 2), slice(2, 3))])
        head = model.get_submodule(anatomy.head)
        with capture_inputs({"head": head}) as inputs:
            model(input_ids=ids, use_cache=False)
        _compare(
            compute_head_input(model, anatomy, hidden), inputs["head"], _EQUAL, "blocks alone differ from the model"
        )


def _rtn(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
    artifact = _compress("rtn", source, folder, text)
    _check_decoded(source, artifact)
    report.opens = _opens(source, artifact)


def _gptq(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
    artifact = _compress("gptq", source, folder / "whole", text)
    _check_decoded(source, artifact)
    resumed = folder / "resumed"

    def kill(event: Any) -> None:
        if event["event"] == "block" and event["block"] == 1:
            raise Killed

    try:
        _compress("gptq", source, resumed, text, report=kill)
    except Killed:
        _compress("gptq", source, resumed, text)
    if _weights(artifact) != _weights(resumed):
        raise Differs("a resumed run writes other weights")


def _method(name: str) -> Callable[..., None]:
    def run(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
        artifact = _compress(name, source, folder, text)
        _compare(_logits(laconic.load(artifact, dtype=torch.float32)), expected, _NEAR, f"{name} changes the model")

    return run


def _cache(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
    model = laconic.load(_compress("cache", source, folder, text), dtype=torch.float32)
    ids, generates = _tokens(), False
    with torch.no_grad():
        try:
            theirs = _in_chunks(model, ids, DynamicCache(config=model.config))
        except Exception as e:
            raise NotTried(f"the model cannot go on from transformers' own cache: {_line(e)}") from e
        ours = _in_chunks(model, ids, _new_cache(model))
    _compare(torch.cat(ours[:2], 1), torch.cat(theirs[:2], 1), _EQUAL, "the cache's window is not exact")
    _compare(torch.cat(ours[2:], 1), torch.cat(theirs[2:], 1), _NEAR, "the cache changes the model")
    few = {"input_ids": ids[:, :8], "max_new_tokens": 4, "min_new_tokens": 4}
    with contextlib.suppress(Exception):
        open_in_transformers(source).generate(**few)
        generates = True
    if generates:
        model.generate(**few)


def _in_chunks(model: PreTrainedModel, ids: Tensor, cache: Cache) -> list[Tensor]:
    return [step(model, ids[:, a:b], cache) for a, b in ((0, 24), (24, 28), (28, 47), (47, 48))]


def _new_cache(model: PreTrainedModel) -> Any:
    from laconic.kv.attach import make_cache

    return make_cache(model, model.kv_scheme)


def _eval(source: Path, folder: Path, text: Path, expected: Tensor, report: Report) -> None:
    artifact = folder.parent / "rtn"
    if not artifact.exists():
        artifact = _compress("rtn", source, folder, text)
    options = TextOptions(text=str(text), baseline=str(source), context_length=32, windows=2)
    result = laconic.evaluate(artifact, options)
    if not result["kl_mean"] > 0:
        raise Differs(f"KL to the original is {result['kl_mean']}")


_STEPS: dict[str, Callable[..., None]] = {
    "stream": _stream,
    "rtn": _rtn,
    "gptq": _gptq,
    "awq": _method("awq"),
    "smoothquant": _method("smoothquant"),
    "cache": _cache,
    "eval": _eval,
}


def _check_decoded(source: Path, artifact: Path) -> None:
    """Compare our reading of an artifact with transformers' of its decoded weights, under the names of its files."""
    decoded = decode_folder(source, artifact, artifact.parent / f"{artifact.name}-decoded")
    model, info = open_in_transformers(decoded, info=True)
    if stacks := [key for key in info["missing_keys"] if ".experts." in key]:
        _restack(decoded, model, stacks)
        model, info = open_in_transformers(decoded, info=True)
    lost = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)]
    if lost:
        raise Differs(f"transformers reports {lost[0]} in the decoded artifact: {sorted(map(str, info[lost[0]]))[:3]}")
    ours = laconic.load(artifact, dtype=torch.float32)
    _check_copied(source, artifact, decoded)
    _compare(_logits(ours), _logits(model), _EQUAL, "laconic.load and transformers read the artifact differently")
    shutil.rmtree(decoded)


def _restack(decoded: Path, model: PreTrainedModel, stacks: list[str]) -> None:
    """Stack the experts of a decoded artifact as transformers does, where it reads them stacked only."""
    file = decoded / "model.safetensors"
    tensors = load_file(file)
    for key in stacks:
        path, _, leaf = key.rpartition(".")
        module, stack, kind = model.get_submodule(path), leaf.removesuffix("_bias"), leaf.endswith("_bias")
        names = ["gate_proj", "up_proj"] if stack == "gate_up_proj" else [stack]
        own = "bias" if kind else "weight"
        tail = f"{path[path.index('layers.') :]}.0.{names[0]}.{own}"
        stored = next(n for n in tensors if n.endswith(tail)).removesuffix(f".0.{names[0]}.{own}")
        experts = []
        for i in range(len(getattr(module, leaf))):
            parts = [tensors.pop(f"{stored}.{i}.{n}.{own}") for n in names]
            alternate = len(parts) == 2 and not getattr(module, "is_concatenated", True)
            joined = torch.stack(parts, 1).flatten(0, 1) if alternate else torch.cat(parts)
            transposed = joined.dim() == 2 and tuple(joined.shape) != tuple(getattr(module, leaf).shape[1:])
            transposed |= bool(getattr(module, "is_transposed", False)) and joined.dim() == 2
            experts.append(joined.T if transposed else joined)
        tensors[key] = torch.stack(experts).contiguous()
    save_file(tensors, file, {"format": "pt"})


def _check_copied(source: Path, artifact: Path, decoded: Path) -> None:
    """Check that the artifact holds whatever the source does: quantized, or with its bytes."""
    before, after, values = (
        {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        for folder in (source, artifact, decoded)
    )
    for name, tensor in before.items():
        if name in after and not (after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)):
            raise Differs(f"{name} is not quantized, and has other bytes")
        if name not in values and tensor.dim() < 3 and "expert" not in name:
            raise Differs(f"{name} is lost")


def decode_folder(source: Path, artifact: Path, output: Path) -> Path:
    """Copy an artifact of packed weights with every weight decoded, by nothing of Laconic's own."""
    output.mkdir()
    for file in artifact.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, output)
    config = json.loads((artifact / "config.json").read_text())
    bits = next(iter(config.pop("quantization_config")["config_groups"].values()))["weights"]["num_bits"]
    (output / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for file in sorted(artifact.glob("*.safetensors")):
        tensors |= load_file(file)
    transposed = tuple(n for n, m in open_in_transformers(source).named_modules() if isinstance(m, Conv1D)) or ("\0",)
    packed = [n.removesuffix("_packed") for n in tensors if n.endswith(".weight_packed")]
    if not packed:
        raise Differs("nothing is quantized")
    for name in packed:
        shape = torch.Size(tensors.pop(f"{name}_shape").tolist())
        codes = unpack_from_int32(tensors.pop(f"{name}_packed"), bits, shape).float()
        scale = tensors.pop(f"{name}_scale").float()
        weight = codes * scale.repeat_interleave(shape[1] // scale.shape[1], 1)
        # Weights that a file stores as (in, out) are packed as (out, in).
        tensors[name] = weight.T if name.removesuffix(".weight").endswith(transposed) else weight
    save_file({n: t.contiguous() for n, t in tensors.items()}, output / "model.safetensors", {"format": "pt"})
    return output


def _opens(source: Path, artifact: Path) -> str:
    """Whether transformers opens the artifact itself and gives our logits; if not why, and whether we say so."""
    recipe = yaml.safe_load((artifact / "recipe.yaml").read_text())
    stages = recipe.get("recipe", recipe)["stages"]
    plan = laconic.plan(str(source), {"stages": stages}, artifact.parent / "planned")
    warning = next((w for w in plan.warnings if w.startswith("transformers cannot open")), None)
    try:
        model = open_in_transformers(artifact)
        _compare(
            _logits(model),
            _logits(laconic.load(artifact, dtype=torch.float32)),
            0.02,
            "transformers reads it differently",
        )
    except Exception as e:
        return f"no, and says so: {warning}" if warning else f"no, unsaid: {_line(e)}"
    return "yes" if warning is None else f"yes, though it says: {warning}"


def _weights(folder: Path) -> dict[str, bytes]:
    return {n: b for n, b in contents(folder).items() if n.endswith((".safetensors", "config.json"))}


def _tokens() -> Tensor:
    return torch.randint(3, 100, (2, 48), generator=torch.Generator().manual_seed(0)) % VOCABULARY


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=_tokens(), use_cache=False).logits.float()
    if not out.isfinite().all():
        raise Differs("logits are not finite")
    return out


def _compare(a: Tensor, b: Tensor, bound: float, what: str) -> None:
    distance = float((a - b).norm() / b.norm().clamp(min=1e-30))
    if not distance <= bound:
        raise Differs(f"{what} (relative distance {distance:.2g})")
