"""Upload of an artifact to a repository of the Hub: all its files in one commit, without pickles."""

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

from laconic.artifact.identity import partial_folder
from laconic.cards.writing import recipe_of
from laconic.checkpoint.files import first_line, open_checkpoint

# Base error of the HTTP library of huggingface_hub; the library depends on the version.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5")
_IGNORED = {".git", ".cache", ".huggingface", "__pycache__"}


def files_to_push(folder: Path) -> dict[str, int]:
    """List the files of a finished artifact.

    Args:
        folder: Folder of the artifact.

    Returns:
        Size in bytes by name in the repository.

    Raises:
        ValueError: The artifact is not finished or incomplete, holds a pickle, or a link to a file outside of it.
    """
    if folder.name.endswith(".partial") or (folder.name.isdigit() and folder.parent.name.endswith(".steps")):
        raise ValueError(
            f"{folder} belongs to an unfinished run and is not a finished artifact; run 'laconic compress' to its end"
        )
    if not folder.is_dir() and partial_folder(folder).is_dir():
        raise ValueError(
            f"{folder} is not finished ({partial_folder(folder).name} exists); run 'laconic compress' again"
        )
    recipe_of(folder)
    open_checkpoint(folder)
    if not (folder / "results" / "compress.json").is_file():
        raise ValueError(f"{folder} lacks results/compress.json, so it is not finished; run 'laconic compress' again")
    sizes = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        name = file.relative_to(folder).as_posix()
        if _IGNORED.intersection(file.relative_to(folder).parts) or file.suffix == ".writing":
            continue
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} is a link to a file outside of {folder}; replace it by the file, or remove it")
        if _is_pickle(file):
            raise ValueError(
                f"{name} in {folder} is or may hold a pickle, which runs code when it is opened; remove it"
            )
        sizes[name] = file.stat().st_size
    return sizes


def push(
    folder: Path,
    repo_id: str,
    files: Sequence[str],
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Commit files to a repository of the Hub; create the repository and the branch if they do not exist.

    Args:
        folder: Folder of the artifact.
        repo_id: Repository, `OWNER/NAME`.
        files: Names of the files, from `files_to_push`.
        private: Make a new repository private; an existing one stays unchanged.
        revision: Branch; None for the main branch.
        message: Commit message; None for a default.

    Returns:
        URL of the commit.

    Raises:
        ValueError: The Hub cannot be reached, or refuses.
    """
    check_repo_id(repo_id)
    with _hub_errors(repo_id, revision):
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
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
    """Check the name of a repository.

    Args:
        repo_id: The name.

    Raises:
        ValueError: It is not a valid name, or has no owner.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as e:
        raise ValueError(f"'{repo_id}' is not a valid repository name; write it as OWNER/NAME ({first_line(e)})") from e
    if "/" not in repo_id:
        raise ValueError(
            f"'{repo_id}' names no owner; write it as OWNER/{repo_id}, OWNER being your user name or organization"
        )


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
    """Turn errors of the Hub and of the connection into one line that names the fix."""
    login = "log in with 'hf auth login', or set HF_TOKEN, with a token that has write access"
    try:
        yield
    except LocalTokenNotFoundError as e:
        raise ValueError(f"no token for the Hub; {login}") from e
    except OfflineModeIsEnabled as e:
        raise ValueError(
            "the Hub is disabled since HF_HUB_OFFLINE is set; unset it, or list the files with --dry-run"
        ) from e
    except RevisionNotFoundError as e:
        raise ValueError(f"{repo_id} has no branch '{revision}', and creating it failed; create it on the Hub") from e
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else None
        if status in (401, 403):
            raise ValueError(f"the Hub refuses to write to {repo_id} ({status}); {login}, and check the owner") from e
        if isinstance(e, RepositoryNotFoundError):
            raise ValueError(f"the Hub has no repository {repo_id}, or hides it; {login}, and check the name") from e
        raise ValueError(
            f"the Hub answered {status} for {repo_id}: {first_line(e)}; nothing was committed, try again later"
        ) from e
    except (_HTTP_ERROR, ConnectionError, TimeoutError) as e:
        raise ValueError(
            f"the Hub cannot be reached ({first_line(e)}); go online and run the same command again"
        ) from e
