"""Start-up time of the command line and of `import laconic`, beside the time that importing torch takes.

    python benchmarks/startup.py [--starts 10]

Prints Markdown: for each command the median over fresh processes, interleaved so that a disturbance of the machine
affects all of them, and its ratio to `import torch`. The first start of each fills the disk cache and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

BASELINE = "import torch"
PROGRAMS = {
    "python -c pass": ["-c", "pass"],
    "import laconic": ["-c", "import laconic"],
    **{
        f"laconic {arguments}": ["-m", "laconic.cli", *arguments.split()]
        for arguments in ("--help", "compress --help", "compres", "ls", "ls gptq", "validate gptq-w4a16")
    },
    BASELINE: ["-c", "import torch"],
    "import transformers": ["-c", "import transformers"],
}


def seconds(program: list[str]) -> float:
    """Run a program in a fresh Python; return how long that took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure every program and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=10, help="processes of each command")
    starts = parser.parse_args().starts
    rounds = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(starts + 1)][1:]
    medians = {name: statistics.median(times[name] for times in rounds) for name in PROGRAMS}
    print(f"Median of {starts} starts.\n\n| command | seconds | of `{BASELINE}` |\n|---|---:|---:|")
    for name, median in medians.items():
        print(f"| `{name}` | {median:.2f} | {median / medians[BASELINE]:.0%} |")


if __name__ == "__main__":
    main()
