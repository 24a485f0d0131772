"""The command that writes a quantized model in 16 bit: `laconic dequantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laconic.checkpoint.trust import Trust
from laconic.cli.console import CompressionProgress, err, out, print_json
from laconic.cli.options import Json, Overwrite, Pickle, RemoteCode


def dequantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An artifact, or a quantized model of another tool.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the 16-bit checkpoint.")],
    overwrite: Overwrite = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Write a quantized model as a plain 16-bit checkpoint. Run it again after an interruption to resume."""
    from laconic.pipeline.dequantize import dequantize as write

    trust = Trust(trust_remote_code, allow_pickle)
    with CompressionProgress(quiet=json_ or not err.is_terminal) as progress:
        folder = write(model, output, overwrite=overwrite, trust=trust, report=progress)
    nbytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if json_:
        print_json({"output": str(folder), "bytes": nbytes})
        return
    out.print(f"16-bit checkpoint: {folder} ({nbytes:,} bytes)", soft_wrap=True)
