"""Client of `laconic bench serving`: vLLM's own `vllm bench serve`, for several loads in one process.

It is a script for vLLM's python, where laconic need not be installed: `python bench_client.py LOADS.json
RESULTS.jsonl`. Each load is a list of arguments of `vllm bench serve`, and gives one line of its result, with `joules`
and `device_bytes` of the card beside it where NVML counts them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Card:
    """The first visible GPU, as NVML reports it; this process itself needs no CUDA."""

    def __init__(self) -> None:
        self.nvml: Any = None
        try:
            from vllm.platforms import current_platform
            from vllm.utils.import_utils import import_pynvml

            nvml = import_pynvml()
            nvml.nvmlInit()
            physical = getattr(current_platform, "visible_device_id_to_physical_device_id", lambda i: i)
            self.handle = nvml.nvmlDeviceGetHandleByIndex(physical(0))
            self.nvml = nvml
        except Exception:  # No library, no driver, no card: nothing is reported.
            pass

    @property
    def used_bytes(self) -> int | None:
        """Bytes that all processes hold; None without NVML."""
        return None if self.nvml is None else int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the card; None without NVML."""
        return None if self.nvml is None else int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).total)

    @property
    def joules(self) -> float | None:
        """Energy since the driver was loaded; None where it is not counted."""
        try:
            return None if self.nvml is None else self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except Exception:  # No counter on this card, or no permission.
            return None


def main() -> None:
    """Run the loads one after another."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    loads, results = map(Path, sys.argv[1:])
    card, benchmark = Card(), serve.benchmark

    async def measured(**options: Any) -> dict[str, Any]:
        before = card.joules
        result: dict[str, Any] = await benchmark(**options)
        after = card.joules
        joules = None if before is None or after is None else after - before
        return result | {"joules": joules, "device_bytes": card.used_bytes}

    serve.benchmark = measured
    with results.open("w") as lines:
        for load in json.loads(loads.read_text()):
            parser = FlexibleArgumentParser()
            serve.add_cli_args(parser)
            print(json.dumps(serve.main(parser.parse_args(load))), file=lines, flush=True)


if __name__ == "__main__":
    main()
