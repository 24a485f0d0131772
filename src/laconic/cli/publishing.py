"""The commands that describe and publish an artifact: `laconic card`, `laconic push`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from laconic.checkpoint.trust import Trust
from laconic.cli.console import err, out, print_json
from laconic.cli.options import ArtifactFolder, Json, Pickle, RemoteCode
from laconic.pipeline.preview import format_bytes


def card(
    artifact: ArtifactFolder,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An evaluation set to look for in the texts that were used. Repeatable."),
    ] = None,
    ngram: Annotated[int, typer.Option(min=2, help="Number of equal words in a row that make an overlap.")] = 13,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Rewrite an artifact's model card and data card, and check its texts against evaluation sets."""
    from laconic.cards.writing import DATA, README, check_against, refresh_cards

    trust = Trust(trust_remote_code, allow_pickle)
    remarks = refresh_cards(artifact, trust=trust)
    overlaps = check_against(artifact, against, n=ngram, trust=trust) if against else []
    cards = [str(artifact.resolve() / name) for name in (README, f"cards/{DATA}")]
    for remark in remarks:
        err.print(f"note: {remark}", highlight=False, soft_wrap=True)
    if json_:
        print_json({"cards": cards, "remarks": remarks, "contamination": overlaps})
        return
    if overlaps:
        out.print(_overlaps_table(overlaps))
    elif against:
        out.print("nothing to check: no text was read to make this artifact")
    for name in cards:
        out.print(name, highlight=False, soft_wrap=True)


def push(
    artifact: ArtifactFolder,
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Commit to this branch; main by default.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List the files with their sizes, and send nothing.")] = False,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Pickle = False,
    json_: Json = False,
) -> None:
    """Send a finished artifact to the Hugging Face Hub, in one commit."""
    from laconic.cards.push import check_repo_id, files_to_push
    from laconic.cards.push import push as send
    from laconic.cards.writing import README, refresh_cards

    check_repo_id(repo_id)
    files = files_to_push(artifact)
    if README not in files and not dry_run:
        refresh_cards(artifact, trust=Trust(trust_remote_code, allow_pickle))
        files = files_to_push(artifact)
    commit = None
    if not dry_run:
        commit = send(artifact, repo_id, list(files), private=private, revision=revision, message=message)
    if json_:
        print_json({"repo_id": repo_id, "revision": revision or "main", "files": files, "commit": commit})
        return
    if commit is None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("file", overflow="fold")
        table.add_column("bytes", justify="right", no_wrap=True)
        for name, size in files.items():
            table.add_row(name, f"{size:,}")
        out.print(table)
    outcome = f"would go to {repo_id}, branch {revision or 'main'}" if commit is None else f"pushed: {commit}"
    total = format_bytes(sum(files.values()))
    out.print(f"{len(files)} files, {total} {outcome}", highlight=False, soft_wrap=True)


def refreshing(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command that measures an artifact (its argument `model`), so that it updates the artifact's cards.

    Args:
        command: The command; it has `model`, `trust_remote_code` and `allow_pickle` among its options.

    Returns:
        The command. An error while cards are updated becomes a note.
    """

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        command(*args, **options)
        folder = Path(str(options.get("model", ""))).expanduser()
        if not (folder / "recipe.yaml").is_file():
            return
        from laconic.cards.writing import refresh_cards

        try:
            remarks = refresh_cards(folder, trust=Trust(options["trust_remote_code"], options["allow_pickle"]))
        except (ValueError, OSError) as e:
            remarks = [f"the cards were not updated: {e}"]
        for remark in remarks:
            err.print(f"note: {' '.join(remark.split())}", highlight=False, soft_wrap=True)

    return run


def _overlaps_table(overlaps: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("set", "evaluation set", "documents", "with an overlap", "runs of words", "shared"):
        table.add_column(name, justify="left" if "set" in name else "right", overflow="fold")
    for check in overlaps:
        if "unchecked" in check:
            table.add_row(check["set"], check["against"], "not checked", check["unchecked"], "", "")
            continue
        numbers = [f"{check['judged']:,} of {check['documents']:,}"]
        for part, whole in (("hit", "judged"), ("ngrams", ""), ("shared", "ngrams")):
            share = f" ({check[part] / check[whole]:.2%})" if whole and check[whole] else ""
            numbers.append(f"{check[part]:,}{share}")
        table.add_row(check["set"], check["against"], *numbers)
    return table
