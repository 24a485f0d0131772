"""Runs in vLLM's own environment: serve models one after another, and write what each said, and kept, as JSON.

usage: python serve_kv.py JOBS.json OUT.json

A job is {"options": of vllm.LLM, "rounds": [[prompt, ...], ...], "sampling": of vllm.SamplingParams, "times": how often
the last round is run, 1 if not said}; prompts are lists of token ids.
"""

import gc
import json
import sys
from typing import Any

import psutil


def main() -> None:
    jobs_file, out_file = sys.argv[1:]
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(jobs_file) as f:
        jobs = json.load(f)
    found = []
    for job in jobs:
        try:
            found.append(serve(job))
        except Exception as e:
            found.append({"error": str(e)})
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(out_file, "w") as f:
        json.dump(found, f)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    folder = job["options"]["model"]
    llm = LLM(tokenizer=folder, enforce_eager=True, disable_log_stats=True, **job["options"])
    config = llm.llm_engine.vllm_config.cache_config
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    pool = scheduler.kv_cache_manager.block_pool
    params = SamplingParams(temperature=0.0, ignore_eos=True, **job["sampling"])
    found: dict[str, Any] = {"tokens_that_fit": config.num_gpu_blocks * config.block_size, "rounds": []}
    layers: list[Any] = list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())
    found["backend"] = type(layers[0].impl).__module__
    found |= {"cache_dtype": config.cache_dtype, "bytes": layers[0].kv_cache.element_size()}
    found["scales"] = [[layer._k_scale_float, layer._v_scale_float] for layer in layers]
    free, memory = pool.get_num_free_blocks(), []
    preempted = 0
    preempt = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = count
    rounds = [*job["rounds"], *[job["rounds"][-1]] * (job.get("times", 1) - 1)]
    for prompts in rounds:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        found["rounds"].append([what_was_said(o) for o in outputs])
        memory.append(psutil.Process().memory_info().rss)
    found |= {"preempted": preempted, "memory": memory, "leaked": free - pool.get_num_free_blocks()}
    return found


def what_was_said(output: Any) -> dict[str, Any]:
    said = output.outputs[0]
    prompt = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return {
        "tokens": list(said.token_ids),
        "logprobs": [entry[t].logprob for t, entry in zip(said.token_ids, said.logprobs or [], strict=False)],
        "prompt_logprobs": [entry[t].logprob for t, entry in prompt if entry],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main()
