"""Pushing an artifact to a Hub that stands in this process and speaks its HTTP."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from commands import Laconic

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What was asked of it. branches: files by branch."""

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(raw))
                return self._answer(200, {"url": f"{hub.url}/{hub.created[-1].get('organization', 'me')}/tiny"})
            if self.path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            if match := re.fullmatch(r"/api/models/owner/tiny/branch/(\w+)", self.path):
                hub.branches.setdefault(match[1], {})
                return self._answer(200, {})
            if re.match(r"/api/models/owner/tiny/preupload/", self.path):
                files = [f["path"] for f in json.loads(raw)["files"]]
                told = [{"path": f, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
                return self._answer(200, {"files": told})
            if match := re.match(r"/api/models/owner/tiny/commit/(\w+)", self.path):
                for line in raw.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "header":
                        hub.messages.append(entry["value"]["summary"])
                    else:
                        content = base64.b64decode(entry["value"]["content"])
                        hub.branches[match[1]][entry["value"]["path"]] = content
                commit = {"commitUrl": f"{hub.url}/owner/tiny/commit/abc", "commitOid": "abc", "success": True}
                return self._answer(200, commit)
            return self._answer(404, {"error": "not found"})

        def _answer(self, status: int, body: Any) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with all that a finished artifact has; nothing opens it as a model."""
    folder = tmp_path / "tiny-w8"
    (folder / "results").mkdir(parents=True)
    (folder / "cards").mkdir()
    recipe = {
        "recipe": {"model": "owner/model", "stages": [{"method": "rtn", "scheme": "W8A16"}]},
        "calibration": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "results" / "compress.json").write_text("{}")
    (folder / "cards" / "data.md").write_text("# Data\n")
    save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_all_files_arrive_as_they_are(laconic: Laconic, artifact: Path, hub: Hub) -> None:
    ran = laconic("push", artifact, "owner/tiny")
    assert ran.code == 0, ran.err
    assert hub.branches == {"main": files(artifact)}
    assert hub.messages == ["tiny-w8, compressed by Laconic"]
    assert f"{hub.url}/owner/tiny/commit/abc" in ran.out
    assert "private" not in json.dumps(hub.created)


def test_a_private_repository_a_branch_and_a_message(laconic: Laconic, artifact: Path, hub: Hub) -> None:
    asked = ("--private", "--revision", "w8", "--message", "8 bits", "--json")
    ran = laconic("push", artifact, "owner/tiny", *asked)
    assert ran.code == 0, ran.err
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.branches == {"main": {}, "w8": files(artifact)}
    assert hub.messages == ["8 bits"]
    told = json.loads(ran.out)
    assert told["files"] == {name: len(content) for name, content in sorted(files(artifact).items())}


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(laconic: Laconic, artifact: Path, hub: Hub) -> None:
    ran = laconic("push", artifact, "owner/tiny", "--dry-run")
    assert ran.code == 0, ran.err
    for name, content in files(artifact).items():
        assert re.search(rf"{re.escape(name)}\s+{len(content):,}\b", ran.out), name
    assert "would go to owner/tiny, branch main" in ran.out
    assert (hub.created, hub.branches) == ([], {"main": {}})


def test_what_is_not_finished_is_refused(laconic: Laconic, artifact: Path, hub: Hub, tmp_path: Path) -> None:
    partial = artifact.rename(tmp_path / "other.partial")
    assert "finished artifact" in laconic("push", partial, "owner/tiny").complaint
    assert "is not finished (other.partial exists)" in laconic("push", tmp_path / "other", "owner/tiny").complaint
    whole = partial.rename(tmp_path / "whole")
    (whole / "results" / "compress.json").unlink()
    assert "is not finished" in laconic("push", whole, "owner/tiny").complaint
    (whole / "model.safetensors").unlink()
    assert laconic("push", whole, "owner/tiny").complaint
    (whole / "recipe.yaml").unlink()
    assert "is not a Laconic artifact" in laconic("push", whole, "owner/tiny").complaint
    assert hub.created == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapters/a.pt", "disguised.txt", "saved.dat"])
def test_pickles_are_never_pushed(laconic: Laconic, artifact: Path, hub: Hub, name: str) -> None:
    import pickle

    file = artifact / name
    file.parent.mkdir(exist_ok=True)
    torch.save({"w": 1}, file) if name == "saved.dat" else file.write_bytes(pickle.dumps({"w": 1}))
    assert f"{name} in {artifact} is or may hold a pickle" in laconic("push", artifact, "owner/tiny").complaint
    assert hub.created == []


def test_a_link_that_leads_out_is_refused(laconic: Laconic, artifact: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    (artifact / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "notes.txt is a link to a file outside" in laconic("push", artifact, "owner/tiny").complaint
    assert hub.created == []


def test_a_token_that_may_not_write(
    laconic: Laconic, artifact: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    said = laconic("push", artifact, "owner/tiny").complaint
    assert "the Hub refuses to write to owner/tiny (401)" in said
    assert "hf auth login" in said
    assert "hf_of" not in said


def test_offline_and_out_of_reach(laconic: Laconic, artifact: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in laconic("push", artifact, "owner/tiny").complaint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in laconic("push", artifact, "owner/tiny").complaint


@pytest.mark.parametrize("name", ["a/b/c", "owner/ti ny", "..", ""])
def test_names_that_no_repository_has(laconic: Laconic, artifact: Path, hub: Hub, name: str) -> None:
    assert "is not a valid repository name; write it as OWNER/NAME" in laconic("push", artifact, name).complaint


def test_a_name_without_an_owner_is_refused(laconic: Laconic, artifact: Path, hub: Hub) -> None:
    assert laconic("push", artifact, "tiny", "--dry-run").complaint.startswith(
        "'tiny' names no owner; write it as OWNER/tiny"
    )
