"""Send an artifact to a repository of the Hub: all its files in one commit, and no pickle among them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from laconic.artifact.workspace import partial_folder
from laconic.cards.writing import recipe_of
from laconic.checkpoint.files import first_line, open_checkpoint

# Of the HTTP library that huggingface_hub goes by, which is not the same in all its versions.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
_LEFT_OUT = {".git", ".cache", ".huggingface", "__pycache__"}


def files_to_push(folder: Path) -> dict[str, int]:
    """The files of a finished artifact, by their names in the repository, with their bytes.

    Raises: ValueError for an artifact that is not finished or not whole, for pickles, and for links out of it.
    """
    if folder.name.endswith(".partial") or (folder.name.isdigit() and folder.parent.name.endswith(".steps")):
        raise ValueError(f"{folder} is where a run goes on, not a finished artifact; run 'laconic compress' to its end")
    if not folder.is_dir() and partial_folder(folder).is_dir():
        raise ValueError(
            f"{folder} is not finished ({partial_folder(folder).name} is there); run 'laconic compress' again"
        )
    recipe_of(folder)
    open_checkpoint(folder)
    if not (folder / "results" / "compress.json").is_file():
        raise ValueError(f"{folder} lacks results/compress.json, so it was not finished; run 'laconic compress' again")
    found = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = file.relative_to(folder).as_posix()
        if _LEFT_OUT.intersection(file.relative_to(folder).parts) or file.suffix == ".writing":
            continue
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} is a link that leads out of {folder}; put the file itself there, or take it away")
        if _is_pickle(file):
            raise ValueError(f"{name} in {folder} is, or may hold, a pickle, which runs code when opened; take it away")
        found[name] = file.stat().st_size
    return found


def push(
    folder: Path,
    repo_id: str,
    files: Sequence[str],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Make the repository (and the branch `revision`) where there is none, and commit the files. private: of a
    repository that is made here; one that is there stays as it is.

    Returns: where the commit is. Raises: ValueError when the Hub cannot be reached, or refuses.
    """
    check_repo_id(repo_id)
    with _hub_errors(repo_id, revision):
        api = HfApi()
        # The name of a repository without an owner is completed by the Hub.
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files],
            commit_message=message or f"{folder.resolve().name}, compressed by Laconic",
            revision=revision,
        )
    return str(commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Raises: ValueError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except ValueError as e:
        raise ValueError(f"'{repo_id}' is no name of a repository; write it as OWNER/NAME ({first_line(e)})") from e


def _is_pickle(file: Path) -> bool:
    if file.suffix.lower() in _PICKLES or ".pickle" in file.suffixes:
        return True
    with file.open("rb") as f:
        head = f.read(4)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    # torch.save writes a zip with a pickle inside.
    if head == b"PK\x03\x04" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """What goes wrong between here and the Hub, in a line that says what to do."""
    login = "log in by 'hf auth login', or set HF_TOKEN, with a token that may write"
    try:
        yield
    except LocalTokenNotFoundError as e:
        raise ValueError(f"no token for the Hub; {login}") from e
    except OfflineModeIsEnabled as e:
        raise ValueError("the Hub is off: HF_HUB_OFFLINE is set; unset it, or list what would go with --dry-run") from e
    except RevisionNotFoundError as e:
        raise ValueError(f"{repo_id} has no branch '{revision}', and it could not be made") from e
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else None
        if status in (401, 403):
            raise ValueError(f"the Hub refuses to write to {repo_id} ({status}); {login}, and check the owner") from e
        if isinstance(e, RepositoryNotFoundError):
            raise ValueError(f"the Hub finds no {repo_id}, or hides it; {login}, and check the name") from e
        raise ValueError(f"the Hub answered {status} for {repo_id}: {first_line(e)}; nothing was committed") from e
    except (_HTTP_ERROR, ConnectionError, TimeoutError) as e:
        raise ValueError(
            f"the Hub cannot be reached ({first_line(e)}); go online and run the same command again"
        ) from e
