"""Runs in vLLM's own environment: serve an artifact, print greedy tokens and prompt log-probabilities as JSON.

usage: python serve.py ARTIFACT PROMPTS.json OUT.json DTYPE [--emulate | ADAPTER]   (prompts are lists of token ids)

--emulate: let vLLM compute NVFP4 by its own emulation, which it otherwise keeps for GPUs without a kernel. ADAPTER: a
folder with a LoRA adapter that every prompt is answered with; log-probabilities are then those of the greedy tokens,
since vLLM's CPU build cannot tell those of a prompt beside an adapter.
"""

import json
import sys


def said_of(output: object, generated: bool) -> list:
    """Tokens and what was said of each: of the prompt, or of what was written after it."""
    if generated:
        return [(None, None), *zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
    return list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))


def main() -> None:
    folder, prompts_file, out_file, dtype, *more = sys.argv[1:]
    from vllm import LLM, SamplingParams

    adapter = None
    if more == ["--emulate"]:
        from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
        from vllm.platforms import PlatformEnum

        register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")

    elif more:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, more[0])
    with open(prompts_file) as f:
        prompts = json.load(f)
    llm = LLM(
        model=folder,
        tokenizer=folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        enable_prefix_caching=False,
        disable_log_stats=True,
        enable_lora=adapter is not None,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=16, logprobs=1, prompt_logprobs=None if adapter else 1, ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=adapter)
    found = [
        {
            "tokens": list(o.outputs[0].token_ids),
            "prompt_logprobs": [
                None if entry is None else entry[token].logprob for token, entry in said_of(o, adapter is not None)
            ],
        }
        for o in outputs
    ]
    with open(out_file, "w") as f:
        json.dump(found, f)


if __name__ == "__main__":
    main()
