"""Runs in vLLM's own environment: serve one model after another, since the start of a process is most of its time.

usage: python serve.py NUMBER_OF_A_PIPE

Each line of the standard input is a job as JSON, and its result is a line of JSON in the pipe. A job is {"options": of
vllm.LLM, "rounds": [[prompt, ...], ...], "sampling": of vllm.SamplingParams}, prompts being lists of token ids, and

"times": how often the last round is run, 1 if absent.
"adapter": a folder with a LoRA adapter that every prompt is answered with. vLLM's CPU build cannot give the
    log-probabilities of a prompt beside an adapter.
"emulate": let vLLM compute NVFP4 by its own emulation, which it otherwise keeps for GPUs without a kernel.
"""

import gc
import json
import os
import sys
import traceback
from functools import cache
from typing import Any

import psutil


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM collects nine times a model, which takes longer than all else that it does of one.
    collect, gc.collect = gc.collect, lambda *_: 0
    with os.fdopen(int(sys.argv[1]), "w") as results:
        for line in sys.stdin:
            try:
                result = serve(json.loads(line))
            except Exception as e:
                traceback.print_exc()
                result = {"error": str(e)}
            collect()
            cleanup_dist_env_and_memory()
            collect()
            print(json.dumps(result), file=results, flush=True)


@cache
def emulate_nvfp4() -> None:
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
    from vllm.platforms import PlatformEnum

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    from vllm import LLM, SamplingParams

    if job.get("emulate"):
        emulate_nvfp4()
    folder, adapter = job["options"]["model"], job.get("adapter")
    llm = LLM(
        tokenizer=folder,
        enforce_eager=True,
        disable_log_stats=True,
        enable_lora=adapter is not None,
        **job["options"],
    )
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    config = llm.llm_engine.vllm_config.cache_config
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    pool = scheduler.kv_cache_manager.block_pool
    params = SamplingParams(temperature=0.0, ignore_eos=True, **job["sampling"])
    found: dict[str, Any] = {"tokens_that_fit": config.num_gpu_blocks * config.block_size, "rounds": []}
    context: dict[str, Any] = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if hasattr(layer, "kv_cache") and hasattr(layer, "impl")]
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
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False, lora_request=request)
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
