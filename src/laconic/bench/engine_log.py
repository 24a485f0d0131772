"""Facts about a model in vLLM's log: kernels, bytes of weights, tokens that the cache holds, the error."""

from __future__ import annotations

import re
from typing import Any

# vLLM 0.32 writes `Using KERNEL for LAYER` or `Selected KERNEL for LAYER`; the plugin names the format of a cache.
_KERNELS = (
    re.compile(r"(?:Using|Selected) (\w+Kernel\w*) for "),
    re.compile(r"Using (?:AttentionBackendEnum\.)?(\w+) (?:attention )?backend"),
    re.compile(r"keys and values are stored by '(\w+)'"),
)
_WEIGHTS = re.compile(r"Model loading took ([\d.]+) GiB")
_CACHE = re.compile(r"(?:GPU|CPU) KV cache size: ([\d,]+) tokens")
_PREFIX = re.compile(r"^(?:\([^)]*\)\s*)*(?:ERROR [\d:. -]+\[[^\]]*\] )?")
_ERROR = re.compile(r"(?:[a-zA-Z_]\w*\.)*\w*(?:Error|Exception)\b")
# Errors that only say that another process had one.
_FOLLOWERS = ("Engine core initialization failed", "EngineCore encountered an issue", "EngineDeadError", "WorkerProc")
_MORE_LINES = 3
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def read_engine_log(log: str) -> dict[str, Any]:
    """Return the facts that vLLM's log has about a model.

    Args:
        log: Standard output and error of the engine, at level INFO.

    Returns:
        `kernels`: names in order of appearance, each once; `weight_bytes` and `cache_tokens`, None where the log does
        not say.
    """
    log = _COLOUR.sub("", log)
    matches = sorted((m for pattern in _KERNELS for m in pattern.finditer(log)), key=lambda m: m.start())
    names = [m.group(1) + (" cache" if m.re is _KERNELS[-1] else "") for m in matches]
    weights, cache = _WEIGHTS.search(log), _CACHE.search(log)
    return {
        "kernels": list(dict.fromkeys(names)),
        "weight_bytes": round(float(weights.group(1)) * 2**30) if weights else None,
        "cache_tokens": int(cache.group(1).replace(",", "")) if cache else None,
    }


def engine_error(log: str) -> str:
    """Return the error that ended an engine, in one line.

    Args:
        log: Its standard output and error.

    Returns:
        The first exception of its log that names a cause, or else the last line.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in _COLOUR.sub("", log).splitlines()]
    starts = [i for i, line in enumerate(lines) if _ERROR.match(line)]
    causes = [i for i in starts if not any(word in lines[i] for word in _FOLLOWERS)]
    if not starts:
        return next((line.strip() for line in reversed(lines) if line.strip()), "the engine wrote nothing")
    first = (causes or starts)[0]
    # A message that ends with a colon goes on in the lines below.
    length = 1 + _MORE_LINES if lines[first].endswith(":") else 1
    return " ".join(line.strip() for line in lines[first : first + length])
