"""Publishing model folders, and loading them by their id, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import efficient_asr
from efficient_asr.commands import run_command
from efficient_asr.models import hub, loading
from efficient_asr.models.backends import ENTRY as BACKEND
from efficient_asr.models.ctc import CTCModel
from efficient_asr.models.whisper.model import PADDING
from efficient_asr.utils.errors import UserError

COMMIT = "0" * 39 + "1"
TOKEN = "hf_of_the_test"


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks for when it uploads and downloads small files."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    objects: dict[str, bytes]
    full: bool
    seen: list[str]

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
            self.answer({"url": f"{here}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer({"files": [{"path": n, "uploadMode": mode[n], "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self.commit(self.repositories[name], [json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{here}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{"actions": {"upload": {"href": f"{here}/objects/{each['oid']}"}}} for each in objects]
            self.answer({"transfer": "basic", "objects": [a | b for a, b in zip(objects, uploads, strict=True)]})
        else:
            self.answer({"errors": [], "warnings": []})  # of the README's head

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.full:
            self.answer({"error": "out of space"}, 400)
            return
        self.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self.seen.append(self.path)
        name, resolve, file = self.path.lstrip("/").partition("/resolve/")
        if resolve:
            content = self.repositories.get(name, {}).get(file.partition("/")[2])
            if content is None:
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            tag = hashlib.sha1(content).hexdigest()
            self.answer(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            return
        name = self.path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
        files = self.repositories.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": f, "size": len(c or b""), "oid": "1"} for f, c in files.items()])
        else:
            siblings = [{"rfilename": file} for file in files]
            self.answer({"id": name, "sha": COMMIT, "private": self.private[name], "siblings": siblings})

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub, and a client that knows no other one."""
    handler = type("OwnHub", (Hub,), {"repositories": {}, "private": {}, "objects": {}, "full": False, "seen": []})
    own = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=own.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{own.server_port}"
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loading.hub_problem.cache_clear()
    yield handler
    loading.hub_problem.cache_clear()
    own.shutdown()
    own.server_close()


@pytest.fixture
def folder(tiny_ctc: CTCModel, tmp_path: Path) -> Path:
    """A model folder."""
    tiny_ctc.save(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_entries_are_those_that_are_written() -> None:
    assert {BACKEND, PADDING} < set(hub.OURS)


def test_a_published_model_is_loaded_by_its_id(
    server: type[Hub], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".note").write_text("of the author")
    assert run_command("publish", [str(folder), "team/fast", "--private"]) == 0
    assert f"model: {huggingface_hub.constants.ENDPOINT}/team/fast" in capsys.readouterr().out
    assert server.private == {"team/fast": True}
    assert server.repositories["team/fast"] == {k: v for k, v in content(folder).items() if k != ".note"}
    card = server.repositories["team/fast"]["README.md"].decode()
    assert "Nothing was measured." in card and 'load_transcriber("team/fast")' in card

    wav = torch.randn(1, 16000)
    fetched, kept = (efficient_asr.load_transcriber(source) for source in ("team/fast", folder))
    assert torch.equal(*(model.model(wav, torch.ones(1))[0] for model in (fetched, kept)))


def test_a_whisper_with_its_own_length_is_fetched_as_a_whole(
    server: type[Hub], tiny_whispers: dict[str, str], tmp_path: Path
) -> None:
    assert run_command("calibrate", [tiny_whispers["small"], "--out", str(tmp_path / "cached")]) == 0
    hub.publish(tmp_path / "cached", "team/cached")
    plain = Path(shutil.copytree(tiny_whispers["small"], tmp_path / "plain"))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "about"}))
    hub.publish(plain, "team/plain")
    fetched = efficient_asr.load_transcriber("team/cached", language="en")
    assert fetched.label == efficient_asr.load_transcriber(tmp_path / "cached", language="en").label
    assert "silence cache" in ", ".join(fetched.changes)
    assert hub.fetch("team/plain") == "team/plain"  # transformers knows it
    assert any("team/plain/resolve" in path for path in server.seen)  # it was asked for
    assert hub.fetch("team/none") == "team/none" and hub.fetch("../team/cached") == "../team/cached"


def test_what_is_on_the_hub_is_replaced_only_on_request(
    server: type[Hub], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish(folder, "team/fast")
    server.repositories["team/fast"] |= {".gitattributes": b"", "efficient_asr/config.json": b"of a former model"}
    assert run_command("publish", [str(folder), "team/fast"]) == 2
    assert "team/fast has files already; pass --overwrite" in capsys.readouterr().err
    assert run_command("publish", [str(folder), "team/fast", "--private", "--overwrite"]) == 2
    assert "team/fast exists and is public" in capsys.readouterr().err
    assert run_command("publish", [str(folder), "team/fast", "--overwrite"]) == 0
    assert set(server.repositories["team/fast"]) == {".gitattributes", *content(folder)}


def test_a_failed_transfer_is_a_message(server: type[Hub], folder: Path) -> None:
    server.full = True
    with pytest.raises(UserError, match="team/fast: the upload failed"):
        hub.publish(folder, "team/fast")
    server.full = False
    hub.publish(folder, "team/fast")
    server.repositories["team/fast"]["model.safetensors"] = None
    with pytest.raises(UserError, match="'team/fast' cannot be downloaded"):
        hub.fetch("team/fast")


def test_results_of_a_model_on_the_hub_say_what_it_is(
    server: type[Hub], folder: Path, corpus: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    about = {"technique": "early_exit", "variant": "exit at 2", "recipe": "early_exit"}
    (folder / "config.json").write_text(json.dumps(config | {"about": about}))
    hub.publish(folder, "team/fast")
    out = str(tmp_path / "result.json")
    options = ["--manifest", str(corpus / "test.jsonl"), "--no_macs", "--repeats", "1", "--out", out]
    assert run_command("evaluate", ["team/fast", *options]) == 0
    result = json.loads(Path(out).read_text())
    assert (result["technique"], result["variant"]) == ("early_exit", "exit at 2")


def test_without_a_connection_the_downloaded_model_is_used(
    server: type[Hub], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(folder, "team/fast")
    path = hub.fetch("team/fast")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loading.hub_problem.cache_clear()
    assert hub.fetch("team/fast") == path
    with pytest.raises(UserError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\); a path such as ./team/fast"):
        hub.publish(folder, "team/fast")


def test_a_refused_upload_says_how_to_log_in(
    server: type[Hub], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert run_command("publish", [str(folder), "team/fast"]) == 2
    assert "the hub refused it; log in with `hf auth login`" in capsys.readouterr().err
    assert run_command("publish", [str(folder), "team/a b"]) == 2
    assert "team/a b: not a hub id" in capsys.readouterr().err


def test_a_folder_is_published_whole_or_not_at_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "shared" / "fast"
    assert run_command("publish", [str(folder), str(target)]) == 0
    card = (target / "README.md").read_text()
    assert content(target) | {"README.md": b""} == content(folder) | {"README.md": b""} and str(target) in card
    assert (
        efficient_asr.load_transcriber(target).model.settings == efficient_asr.load_transcriber(folder).model.settings
    )
    assert run_command("publish", [str(folder), str(target)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    (folder / "README.md").write_text("# Mine")
    assert run_command("publish", [str(folder), str(target), "--overwrite"]) == 0
    assert (target / "README.md").read_text() == "# Mine" and [*target.parent.iterdir()] == [target]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    for wrong, message in (
        (other, "is not a model folder, and is not replaced"),
        (folder / "inside", "contains the other"),
        (other / "cat.jpg", "is a file"),
        ("https://huggingface.co/team/fast", "not a URL"),
    ):
        assert run_command("publish", [str(folder), str(wrong), "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert run_command("publish", [str(tmp_path), str(target)]) == 2
    assert "is not a model folder: it has no config.json" in capsys.readouterr().err
