"""Comparison of Laconic with its peers on the same model, tokens, seeds and threads.

    benchmarks/race/setup.sh DIR
    python benchmarks/race --environments DIR --text TEXT [--model FOLDER] [--cases gptq-128 ...] [--contestants ...]

The default model is a wide random Llama (hidden 2048, intermediate 5632, 4 layers, 16/8 heads, vocabulary 8000) with
random tokens. Every run is a separate process, one after another. Each result is appended to a file, and runs whose
results are in it are skipped; the table, in Markdown, is printed from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "gptq-128": {"case": "gptq", "group_size": 128},
    "gptq-32": {"case": "gptq", "group_size": 32},
    "awq-128": {"case": "awq", "group_size": 128},
    "smoothquant-rtn": {"case": "smoothquant-rtn", "group_size": None},
    "smoothquant-gptq": {"case": "smoothquant-gptq", "group_size": None},
    "autoround-128": {"case": "autoround", "group_size": 128},
}
PEERS = {
    "gptq": ("llmcompressor", "gptqmodel"),
    "awq": ("llmcompressor", "gptqmodel"),
    "smoothquant-rtn": ("llmcompressor",),
    "smoothquant-gptq": ("llmcompressor",),
    "autoround": ("autoround",),
}


def main() -> None:
    """Make and measure the missing runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", required=True, type=Path)
    parser.add_argument("--text", required=True, help="calibration text; its second half is held out")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/race"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--contestants", nargs="+", default=["laconic", "llmcompressor", "gptqmodel", "autoround"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--iters", type=int, default=200, help="steps of autoround")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    # Absolute, because peers run in the folder of the results, where GPTQModel writes its logs.
    args.environments, args.work = args.environments.absolute(), args.work.absolute()
    args.text, args.model = str(Path(args.text).absolute()), args.model and args.model.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model or wide_model(args.work / "wide")
    name = model.name
    tokens = make_tokens(args, model)
    results = args.work / f"{name}.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(r["case"], r["contestant"]): r for r in map(json.loads, lines)}
    for case in args.cases:
        for contestant in ("laconic", *PEERS[CASES[case]["case"]]):
            if contestant in args.contestants and (case, contestant) not in done:
                result = {"case": case, "contestant": contestant, **race(args, model, tokens, case, contestant)}
                with results.open("a") as f:
                    f.write(json.dumps(result) + "\n")
                done[case, contestant] = result
    print_table([r for (case, who), r in sorted(done.items()) if case in args.cases and who in args.contestants])


def wide_model(folder: Path) -> Path:
    """Write a random Llama with the width of a model of a few billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=2048,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        demo = HERE.parents[1] / "models" / "demo"
        for file in demo.glob("token*"):
            shutil.copyfile(file, folder / file.name)
    return folder


def make_tokens(args: argparse.Namespace, model: Path) -> Path:
    """Write calibration and held-out windows, the same for all contestants."""
    file = args.work / f"{model.name}-tokens.safetensors"
    if not file.exists():
        if args.model:
            from transformers import AutoTokenizer

            text = Path(args.text).read_text()
            ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text, verbose=False).input_ids)
            windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
            half = len(windows) // 2
            calibration, heldout = windows[:half][: args.samples], windows[half:][:32]
        else:
            windows = torch.randint(
                0, 8000, (args.samples + 16, args.length), generator=torch.Generator().manual_seed(0)
            )
            calibration, heldout = windows[: args.samples], windows[args.samples :]
        save_file({"input_ids": calibration.contiguous(), "heldout": heldout.contiguous()}, file)
    return file


def race(args: argparse.Namespace, model: Path, tokens: Path, case: str, contestant: str) -> dict[str, Any]:
    """Run one contestant on one case in a separate process, and measure the quality of its checkpoint."""
    output = args.work / f"{model.name}-{case}-{contestant}"
    shutil.rmtree(output, ignore_errors=True)
    # Laconic needs a text that passes its checks; its tokens are replaced, so a short text is enough.
    filler = args.work / "filler.txt"
    filler.write_text(Path(args.text).read_text()[: 40 * args.length])
    job = CASES[case] | {"model": str(model), "tokens": str(tokens), "output": str(output), "text": str(filler)}
    file = args.work / "job.json"
    file.write_text(json.dumps(job | {"iters": args.iters}))
    python = args.environments / contestant / "bin" / "python"
    runner = [HERE / "ours.py"] if contestant == "laconic" else [HERE / "peer.py", contestant]
    command = [str(part) for part in (python, *runner, file)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    # On a machine of two cores, GPTQModel makes a pool of one worker but needs two.
    environment |= {"GPTQMODEL_CPU_WORKERS": str(max(2, args.threads))}
    start = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=args.work
    ) as run:
        assert run.stdout
        output_text = run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    line = next((s for s in output_text.splitlines() if s.startswith("RESULT ")), None)
    if line is None:
        print(output_text[-3000:], file=sys.stderr)
        return {"failed": output_text.strip().splitlines()[-1][:200]}
    measured = {
        **json.loads(line.removeprefix("RESULT ")),
        "process": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * 1024,
        "bytes": sum(f.stat().st_size for f in output.rglob("*.safetensors")),
    }
    print(case, contestant, json.dumps(measured), file=sys.stderr, flush=True)
    quality = subprocess.run(
        [sys.executable, str(HERE / "quality.py"), str(model), str(output), str(tokens)], capture_output=True, text=True
    )
    shutil.rmtree(output, ignore_errors=True)
    if quality.returncode:
        print(quality.stderr[-3000:], file=sys.stderr)
        return measured | {"kl": None, "perplexity": None}
    return measured | json.loads(quality.stdout.splitlines()[-1])


def print_table(results: list[dict[str, Any]]) -> None:
    """Print every run, and Laconic's figures relative to those of the best peer."""
    print("| case | contestant | compression s | process s | CPU s | peak GB | checkpoint MB | perplexity | KL |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for r in results:
        who = f"{r['contestant']} {r.get('version', '')}".strip()
        if "failed" in r:
            print(f"| {r['case']} | {who} | failed: {r['failed']} |")
            continue
        quality = "not read | not read" if r["kl"] is None else f"{r['perplexity']:.2f} | {r['kl']:.4f}"
        print(
            f"| {r['case']} | {who} | {r['compress']:.1f} | {r['process']:.1f} | {r['cpu']:.0f} "
            f"| {r['memory'] / 1e9:.2f} | {r['bytes'] / 1e6:.0f} | {quality} |"
        )
    for case in dict.fromkeys(r["case"] for r in results):
        runs = {r["contestant"]: r for r in results if r["case"] == case and "failed" not in r}
        if ours := runs.pop("laconic", None):
            for key, label in (("compress", "time"), ("memory", "peak memory"), ("kl", "KL")):
                rivals = [r[key] for r in runs.values() if r.get(key)]
                if rivals and ours.get(key):
                    print(f"\n{case}: {label} {ours[key] / min(rivals):.2f} of the best peer's", end="")
    print()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    main()
