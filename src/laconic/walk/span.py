"""Names for stretches of work, as a profiler shows them: in torch's traces, and as NVTX ranges in Nsight's.

Without a profiler a span costs a microsecond or two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.profiler import record_function

PREFIX = "laconic: "


def span(name: str) -> AbstractContextManager[object]:
    """While this lasts, what runs is shown under this name."""
    return record_function(f"{PREFIX}{name}")
