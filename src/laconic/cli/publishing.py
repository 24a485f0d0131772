"""The commands that describe an artifact to others and pass it on: `laconic card`, `laconic push`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from laconic.cli.console import err, in_bytes, out, print_json
from laconic.cli.options import Json

Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of a finished artifact.")]


def card(
    artifact: Folder,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Look for this evaluation set in the texts that were used. Repeatable."),
    ] = None,
    ngram: Annotated[int, typer.Option(min=2, help="Words in a row that must be the same.")] = 13,
    json_: Json = False,
) -> None:
    """Write an artifact's model card and data card anew, and check its texts against evaluation sets."""
    from laconic.cards.writing import DATA, README, check_against, refresh_cards

    remarks = refresh_cards(artifact)
    found = check_against(artifact, against, n=ngram) if against else []
    cards = [str(artifact.resolve() / name) for name in (README, f"cards/{DATA}")]
    for remark in remarks:
        err.print(f"note: {remark}", highlight=False, soft_wrap=True)
    if json_:
        print_json({"cards": cards, "remarks": remarks, "contamination": found})
        return
    if found:
        out.print(_overlaps(found))
    elif against:
        out.print("nothing to check: no text was read to make this artifact")
    for name in cards:
        out.print(name, highlight=False, soft_wrap=True)


def push(
    artifact: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Commit to this branch; main by default.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List the files with their sizes, send nothing.")] = False,
    json_: Json = False,
) -> None:
    """Send a finished artifact to the Hugging Face Hub, in one commit."""
    from laconic.cards.push import check_repo_id, files_to_push
    from laconic.cards.push import push as send
    from laconic.cards.writing import README, refresh_cards

    check_repo_id(repo_id)
    files = files_to_push(artifact)
    if README not in files and not dry_run:
        refresh_cards(artifact)
        files = files_to_push(artifact)
    where = None
    if not dry_run:
        where = send(artifact, repo_id, list(files), private=private, revision=revision, message=message)
    if json_:
        print_json({"repo_id": repo_id, "revision": revision or "main", "files": files, "commit": where})
        return
    if where is None:
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("file", overflow="fold")
        table.add_column("bytes", justify="right", no_wrap=True)
        for name, size in files.items():
            table.add_row(name, f"{size:,}")
        out.print(table)
    told = f"{len(files)} files, {in_bytes(sum(files.values()))}"
    said = f"would go to {repo_id}, branch {revision or 'main'}" if where is None else f"pushed: {where}"
    out.print(f"{told} {said}", highlight=False, soft_wrap=True)


def refreshing(command: Callable[..., None]) -> Callable[..., None]:
    """A command that measures an artifact (its `model`), after which the cards tell the results."""

    @wraps(command)
    def run(*args: Any, **asked: Any) -> None:
        command(*args, **asked)
        folder = Path(str(asked.get("model", ""))).expanduser()
        if not (folder / "recipe.yaml").is_file():
            return
        from laconic.cards.writing import refresh_cards

        try:
            remarks = refresh_cards(folder)
        except (ValueError, OSError) as e:
            remarks = [f"the cards were not brought up to date: {e}"]
        for remark in remarks:
            err.print(f"note: {' '.join(remark.split())}", highlight=False, soft_wrap=True)

    return run


def _overlaps(found: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("set", "evaluation set", "documents", "with an overlap", "runs of words", "shared"):
        table.add_column(name, justify="left" if "set" in name else "right", overflow="fold")
    for check in found:
        if "unchecked" in check:
            table.add_row(check["set"], check["against"], "not checked", check["unchecked"], "", "")
            continue
        numbers = [f"{check['judged']:,} of {check['documents']:,}"]
        for part, whole in (("hit", "judged"), ("ngrams", ""), ("shared", "ngrams")):
            share = f" ({check[part] / check[whole]:.2%})" if whole and check[whole] else ""
            numbers.append(f"{check[part]:,}{share}")
        table.add_row(check["set"], check["against"], *numbers)
    return table
