"""Every scheme served by vLLM on the device that is there, beside our own reading of the same file.

    python benchmarks/serve_matrix.py out.json [--vllm-python PYTHON] [--only NAME] [--jobs 6] [--timeout 240]

Makes a small random Llama in every preset and in some variations, computes the log-probabilities of fixed prompts with
`laconic.load`, then lets vLLM compute them, one process a case and several at once. Writes one row a case: whether it
was served or refused, the last line of the error, the mean and largest difference of log-probabilities, that of the
original model beside it, and the kernels that vLLM's log names. Rows are the evidence for `formats/support.py`.

Two environments may share the work: this one has laconic's dependencies, and `--vllm-python` has vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# As wide as kernels ask for: heads of 64 channels, inputs and outputs that 128 divides.
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"head_dim": 64, "vocab_size": 512, "max_position_embeddings": 512}
# Inputs of which 64 is the largest usual divisor.
ODD_SIZES = SIZES | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
PROMPTS, LENGTH = 8, 64
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

Stage = dict[str, Any]


def rtn(scheme: str, **keys: Any) -> Stage:
    """A stage of round to nearest."""
    return {"method": "rtn", "scheme": scheme, **keys}


def cases() -> dict[str, dict[str, Any]]:
    """The recipes by name: stages and other keys, and `sizes` of the model."""
    from laconic.formats.schemes import PRESETS

    head = {"targets": "lm_head", "ignore": []}
    found: dict[str, dict[str, Any]] = {name: {"stages": [rtn(name)]} for name in PRESETS}
    variations = {
        "W4A16 group 64": [rtn("W4A16", group_size=64)],
        "W4A16 group 32": [rtn("W4A16", group_size=32)],
        "W4A16 channel": [rtn("W4A16", group_size=-1)],
        "W4A16_ASYM channel": [rtn("W4A16_ASYM", group_size=-1)],
        "W8A16 group 128": [rtn("W8A16", group_size=128)],
        "W3A16 asymmetric": [rtn("W3A16", symmetric=False)],
        "W2A16 asymmetric": [rtn("W2A16", symmetric=False)],
        "W8A8 static": [rtn("W8A8", dynamic=False)],
        "W4A16, outliers and low rank": [rtn("W4A16", outlier_ratio=0.02, low_rank=4)],
        "head W8A16": [rtn("W4A16"), rtn("W8A16", **head)],
        "head W4A16": [rtn("W4A16", targets=["Linear", "lm_head"], ignore=[])],
        "head alone W8A16": [rtn("W8A16", **head)],
        "embeddings W8A16": [rtn("W4A16"), rtn("W8A16", targets="Embedding")],
        "embeddings W4A16": [rtn("W4A16"), rtn("W4A16", targets="Embedding")],
        "all W4A16": [rtn("W4A16", targets=["Linear", "lm_head", "Embedding"], ignore=[])],
        "blocks W4A16, head and embeddings W8A16": [
            rtn("W4A16"),
            rtn("W8A16", targets=["lm_head", "Embedding"], ignore=[]),
        ],
        "native, embeddings W4A16": [rtn("W4A16", outlier_ratio=0.02), rtn("W4A16", targets="Embedding")],
    }
    found |= {name: {"stages": stages} for name, stages in variations.items()}
    found["W4A16 auto, 576 inputs"] = {"stages": [rtn("W4A16", group_size="auto")], "sizes": ODD_SIZES}
    found["all W4A16, tied"] = found["all W4A16"] | {"sizes": SIZES | {"tied": True}}
    found["W4A8 as for CPUs"] = {"stages": [rtn("W4A8")], "engine": "vllm-cpu"}
    return found


def main() -> None:
    """Make the artifacts, let vLLM serve them, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--vllm-python", default=sys.executable, help="python of an environment with vLLM")
    parser.add_argument("--only", default="", help="cases whose names contain one of these, by commas")
    parser.add_argument("--jobs", type=int, default=6, help="processes at once")
    parser.add_argument("--timeout", type=float, default=240, help="seconds of one case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(Path(scratch), arguments.only)
        served: dict[str, dict[str, Any]] = {}

        def finish(name: str) -> None:
            folder = prepared[name].get("folder")
            row = serve(Path(folder), arguments) if folder else {"outcome": "not made"}
            served[name] = prepared[name] | row
            served[name].pop("folder", None)
            print(f"{name}: {json.dumps(served[name])}", flush=True)
            ordered = {n: served[n] for n in prepared if n in served}
            arguments.output.write_text(json.dumps(ordered, indent=1) + "\n")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(finish, prepared))


def prepare(scratch: Path, only: str) -> dict[str, dict[str, Any]]:
    """Make every artifact with our log-probabilities of the prompts. Returns: its folder, or why there is none."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    import laconic
    from tiny import make_model, make_text

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = scratch / "text.txt"
    text.write_text(make_text(6000))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 100, (PROMPTS, LENGTH), generator=generator).tolist()
    calibration = {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 128}
    models: dict[str, tuple[Path, list[list[float]]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, case) in enumerate(cases().items()):
        if not any(part in name for part in only.split(",")):
            continue
        recipe = {k: v for k, v in case.items() if k != "sizes"} | {"calibration": calibration}
        sizes = case.get("sizes", SIZES)
        key = str(sorted(sizes.items()))
        if key not in models:
            folder = make_model(scratch / f"model-{len(models)}", **sizes)
            models[key] = folder, our_log_probabilities(folder, prompts, device)
        folder = scratch / f"case-{number}"
        try:
            laconic.compress(str(models[key][0]), recipe, folder)
            ours = our_log_probabilities(folder, prompts, device)
        except Exception as e:
            rows[name] = {"message": last_line(str(e) or repr(e))}
            continue
        asked = {"prompts": prompts, "ours": ours, "original": models[key][1]}
        (folder / "asked.json").write_text(json.dumps(asked))
        rows[name] = {"folder": str(folder)}
    return rows


def our_log_probabilities(folder: Path, prompts: list[list[int]], device: str) -> list[list[float]]:
    """Log-probability of every token of the prompts but the first, as `laconic.load` computes it."""
    import torch

    import laconic
    from laconic.evaluation.fidelity import log_probabilities

    model = laconic.load(folder, device=device, dtype=torch.bfloat16)
    found = []
    for ids in prompts:
        scores = log_probabilities(model, torch.tensor([ids], device=device)).cpu()
        found.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def serve(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve one artifact in a process of its own. Returns: the outcome."""
    start = time.monotonic()
    command = [arguments.vllm_python, __file__, "--serve", str(folder)]
    share = {"SERVE_MATRIX_MEMORY": str(round(0.85 / arguments.jobs, 3))}
    log = folder / "vllm.log"
    with log.open("w") as file:
        try:
            process = subprocess.run(
                command, stdout=file, stderr=file, env=os.environ | ENVIRONMENT | share, timeout=arguments.timeout
            )
            failed = process.returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
            file.write(f"\nno answer within {arguments.timeout} s\n")
    lines = log.read_text(errors="replace")
    row = {"kernels": sorted(set(re.findall(r"Using (\w*(?:Kernel|Method|backend|Backend)\w*)", lines)))}
    row |= {"seconds": round(time.monotonic() - start, 1)}
    answer = folder / "answer.json"
    if failed or not answer.exists():
        return {"outcome": "refused", "message": last_line(lines), **row}
    return {"outcome": "ok", **json.loads(answer.read_text()), **row}


def serve_one(folder: Path) -> None:
    """In vLLM's environment: compute the log-probabilities of the prompts, and compare."""
    import torch

    import vllm

    asked = json.loads((folder / "asked.json").read_text())
    llm = vllm.LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=PROMPTS,
        gpu_memory_utilization=float(os.environ.get("SERVE_MATRIX_MEMORY", "0.5")),
        # A size of its own for the cache: vLLM's estimate of what is free fails where other processes come and go.
        kv_cache_memory_bytes=256 << 20 if torch.cuda.is_available() else None,
        disable_log_stats=True,
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False)
    theirs = torch.tensor(
        [
            [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(asked["prompts"], outputs, strict=True)
        ]
    )
    answer = {"vllm": vllm.__version__, "device": _device_name()}
    for name in ("ours", "original"):
        difference = (theirs - torch.tensor(asked[name])).abs()
        answer |= {f"mean_{name}": round(float(difference.mean()), 5), f"max_{name}": round(float(difference.max()), 5)}
    (folder / "answer.json").write_text(json.dumps(answer))


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def last_line(text: str) -> str:
    """The last line of a log that names an error, or the last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [m[0] for line in lines if (m := re.search(r"\b(\w+\.)*\w*(Error|Exception)\b: .*", line))]
    return (errors or lines or ["nothing was said"])[-1][:300]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_one(Path(sys.argv[2]))
    else:
        main()
