"""vLLM's log, read: kernels, bytes, tokens that fit, and the error that ended it."""

from __future__ import annotations

from laconic.bench.engine_log import engine_error, read_engine_log

LOG = """
INFO 11-28 11:00:01 [cuda.py:507] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN'].
(EngineCore pid=7) INFO 11-28 11:00:02 [x.py:138] Using MacheteLinearKernel for CompressedTensorsWNA16
(EngineCore pid=7) INFO 11-28 11:00:02 [x.py:138] Using MarlinLinearKernel for CompressedTensorsWNA16
(EngineCore pid=7) INFO 11-28 11:00:02 [x.py:138] Using MacheteLinearKernel for CompressedTensorsWNA16
(EngineCore pid=7) INFO 11-28 11:00:03 [x.py:847] Selected CutlassInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8
(EngineCore pid=7) INFO 11-28 11:00:03 [vllm_kv.py:9] laconic: keys and values are stored by 'kivi', in pages of slots
(EngineCore pid=7) INFO 11-28 11:00:04 [gpu.py:5150] Model loading took 4.25 GiB memory and 3.123456 seconds
(EngineCore pid=7) INFO 11-28 11:00:05 [kv.py:1] \x1b[32mGPU KV cache size: 1,234,560 tokens\x1b[0m
"""
FAILURE = """
(EngineCore pid=7) ERROR 11-28 11:00:02 [core.py:1] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-28 11:00:02 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 11:00:02 [core.py:1]   File "x.py", line 3, in get_scheme
(EngineCore pid=7) ERROR 11-28 11:00:02 [core.py:1] NotImplementedError: No compressed-tensors compatible scheme
Traceback (most recent call last):
  File "y.py", line 1, in <module>
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_facts_of_a_log_are_read() -> None:
    facts = read_engine_log(LOG)
    assert facts["kernels"] == [
        "FLASH_ATTN",
        "MacheteLinearKernel",
        "MarlinLinearKernel",
        "CutlassInt8ScaledMMLinearKernel",
        "kivi cache",
    ]
    assert facts["weight_bytes"] == round(4.25 * 2**30)
    assert facts["cache_tokens"] == 1_234_560


def test_a_silent_log_has_no_facts() -> None:
    assert read_engine_log("ready\n") == {"kernels": [], "weight_bytes": None, "cache_tokens": None}


def test_the_error_is_the_cause_and_not_what_followed_from_it() -> None:
    assert engine_error(FAILURE) == "NotImplementedError: No compressed-tensors compatible scheme"
    assert engine_error(FAILURE[FAILURE.index("RuntimeError") :]).startswith("RuntimeError: Engine core")
    assert engine_error("Killed\n") == "Killed"
    assert engine_error("ValueError: Failed to find a kernel. Reasons:\n Machete cannot\n") == (
        "ValueError: Failed to find a kernel. Reasons: Machete cannot"
    )
