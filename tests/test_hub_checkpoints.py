"""Checkpoints on the hub: sent to a server on the loopback, fetched from it, from its cache, and refused."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from test_hub import vit
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.predict import Scorer, Settings, read_scores, score_files
from imaginet_nb.data.images import save
from imaginet_nb.models.checkpoints import CheckpointError, fetch_checkpoint, load_detector, read_header, save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

TOKEN = "hf_let_me_write"


class Models(BaseHTTPRequestHandler):
    "The part of the hub's protocol by which a model is made, filled and read. `state.models`: name -> private, commit -> files."
    protocol_version, state = "HTTP/1.1", None

    def log_message(self, *_): pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def body(self): return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        content = self.body()
        self.state.stored[self.path.rpartition("/")[2]] = content
        self.answer(200)

    def do_POST(self):
        path, body, state = self.path.partition("?")[0], self.body(), self.state
        if self.headers.get("Authorization") != f"Bearer {TOKEN}": return self.answer(401, {"error": "Invalid token"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            private = wanted.get("visibility") == "private" or wanted.get("private", False)
            if name in state.models: return self.answer(409, {"url": f"{state.address}/{name}"})
            state.models[name] = SimpleNamespace(private=private, commits={})
            return self.answer(200, {"url": f"{state.address}/{name}", "id": name})
        if path == "/api/validate-yaml": return self.answer(200, {"errors": [], "warnings": []}) # the card's front matter
        if "/preupload/" in path:
            files = [dict(path=file["path"], uploadMode="lfs" if file["path"].endswith(".safetensors") else "regular", shouldIgnore=False)
                     for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [one | {"actions": {"upload": {"href": f"{state.address}/store/{one['oid']}"}}} for one in wanted]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        name = re.match(r"/api/models/([^/]+/[^/]+)/commit/", path)[1]
        model = state.models[name]
        lines = [json.loads(line) for line in body.splitlines()]
        values = {line["value"].get("path"): (line["key"], line["value"]) for line in lines}
        files = {name: base64.b64decode(value["content"]) for name, (key, value) in values.items() if key == "file"}
        files |= {name: state.stored[value["oid"]] for name, (key, value) in values.items() if key == "lfsFile"}
        commit = f"{len(model.commits) + 1:040x}"
        model.commits[commit] = files
        self.answer(200, {"commitOid": commit, "commitUrl": f"{state.address}/{name}/commit/{commit}"})

    def do_GET(self):
        path, state = self.path.partition("?")[0], self.state
        if path == "/": return self.answer(200)
        name = re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)[1]
        model, allowed = state.models.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if model is None or model.private and not allowed: return self.answer(401, X_Error_Code="RepoNotFound")
        kind = next((kind for kind in ("resolve", "revision", "tree") if f"/{kind}/" in path), None)
        if kind is None: return self.answer(200, {"id": name, "private": model.private, "siblings": []})
        revision, _, file = path.partition(f"/{kind}/")[2].partition("/")
        commit = list(model.commits)[-1] if revision == "main" else revision
        if commit not in model.commits: return self.answer(404, X_Error_Code="RevisionNotFound")
        files = model.commits[commit]
        if kind == "tree": return self.answer(200, [dict(type="file", path=one, size=len(files[one]), oid=one) for one in files])
        if kind == "revision":
            siblings = [{"rfilename": one} for one in files]
            return self.answer(200, {"id": name, "private": model.private, "sha": commit, "siblings": siblings})
        if file not in model.commits[commit]: return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = model.commits[commit][file]
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The server, to which the hub's library is led."
    state = SimpleNamespace(models={}, stored={}, address="")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Models,), dict(state=state)))
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", state.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path/"token"))
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False) # its store is another protocol
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", state.address)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None) # between two tries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path):
    "A random detector where a report has it, and a card that names it."
    path = tmp_path/"report"/"checkpoints"/"selfcon.safetensors"
    header = save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), path)
    (tmp_path/"report"/"model_card.md").write_text(f"---\nlicense: mit\n---\n[t](tables/t.csv) {header['sha256']}\n")
    return path


def run(*words, **options): return CliRunner().invoke(app, [str(word) for word in words], **options)


def test_a_checkpoint_is_sent_once_agreed_and_is_the_same_when_it_comes_back(hub, checkpoint, tmp_path):
    refused = run("checkpoint", "push", checkpoint, "someone/detector", input="n\n")
    assert refused.exit_code == 1 and "nothing was sent" in refused.output and hub.models == {}
    assert "nothing was sent" in run("checkpoint", "push", checkpoint, "someone/detector").output # no terminal
    sent = run("checkpoint", "push", checkpoint, "someone/detector", input="y\n")
    assert sent.exit_code == 0 and "private repository someone/detector" in sent.output, sent.output
    model = hub.models["someone/detector"]
    (commit, files), = model.commits.items()
    assert model.private and files["model.safetensors"] == checkpoint.read_bytes()
    assert files["README.md"].decode().splitlines()[-1] == f"t {read_header(checkpoint)['sha256']}"
    save(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), tmp_path/"a.png")
    words = ["--checkpoint", "hf:someone/detector", "--device", "cpu", "--no-views"]
    scored = run("predict", tmp_path/"a.png", "--out", tmp_path/"a.csv", *words)
    assert scored.exit_code == 0, scored.output
    identity = f"someone/detector@{commit}, sha256 {read_header(checkpoint)['sha256']}"
    local = Scorer(load_detector(checkpoint), Settings(views=False), identity)
    found, expected = next(read_scores(tmp_path/"a.csv")), next(score_files([tmp_path/"a.png"], local))
    assert found["settings"] == local.fingerprint
    assert found["logit"] == pytest.approx(expected["logit"], abs=1e-5)


def test_a_classifier_comes_from_the_hub_without_its_code(hub, tmp_path, monkeypatch):
    "Of a branch: its commit is in every row. Files that could run anything are not even fetched."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    vit(tmp_path/"vit")
    files = {path.name: path.read_bytes() for path in (tmp_path/"vit").iterdir()}
    files |= {"modeling_vit.py": b"raise SystemExit('run')", "pytorch_model.bin": b"pickle"}
    hub.models["someone/classifier"] = SimpleNamespace(private=False, commits={"a"*40: {"config.json": b"{}"}, "b"*40: files})
    save(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), tmp_path/"a.png")
    for source, table in (("hf:someone/classifier", "hub.csv"), (f"hf:{tmp_path/'vit'}", "folder.csv")):
        scored = run("predict", tmp_path/"a.png", "--out", tmp_path/table, "--detector", source, "--device", "cpu", "--no-views")
        assert scored.exit_code == 0, scored.output
    found, expected = (next(read_scores(tmp_path/table)) for table in ("hub.csv", "folder.csv"))
    assert found["logit"] == expected["logit"] and "b"*40 in found["settings"]
    fetched = {path.name for path in (tmp_path/"cache").rglob("snapshots/*/*")}
    assert "model.safetensors" in fetched and not fetched & {"modeling_vit.py", "pytorch_model.bin"}


@pytest.mark.parametrize("repository", ["someone/detector@v2", "hf:someone/detector"])
def test_only_a_repository_is_pushed_to(hub, checkpoint, repository):
    "Every push goes to the main branch, so another address is refused before the question."
    refused = run("checkpoint", "push", checkpoint, repository, input="y\n")
    assert refused.exit_code == 1 and "write someone/detector, without" in refused.output, refused.output
    assert "would go to" not in refused.output and hub.models == {}


def test_a_checkpoint_in_the_root_folder_is_an_error_like_any_other():
    refused = run("checkpoint", "push", "/no-such-detector.safetensors", "someone/detector")
    assert refused.exit_code == 1 and isinstance(refused.exception, SystemExit), refused.exception
    assert "/no-such-detector.safetensors: cannot be read" in refused.output


def test_revisions_are_commits_and_the_cache_serves_without_a_network(hub, checkpoint, monkeypatch):
    assert run("checkpoint", "push", checkpoint, "someone/detector", "--yes", "--public").exit_code == 0
    first = next(iter(hub.models["someone/detector"].commits))
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=64), checkpoint)
    assert "the card is not of" in run("checkpoint", "push", checkpoint, "someone/detector", "--yes", "--public").output
    card = checkpoint.parents[1]/"model_card.md"
    card.write_text(read_header(checkpoint)["sha256"])
    assert "exists and is public" in run("checkpoint", "push", checkpoint, "someone/detector", "--yes").output
    assert run("checkpoint", "push", checkpoint, "someone/detector", "--yes", "--public").exit_code == 0
    path, name = fetch_checkpoint(f"hf:someone/detector@{first}")
    assert name.endswith(first) and read_header(path)["input_size"] == 32
    path, name = fetch_checkpoint("hf:someone/detector")
    assert not name.endswith(first) and read_header(path)["input_size"] == 64
    hub.models["someone/detector"].commits["f"*40] = {"README.md": b"", "model.safetensors": b"no weights"}
    assert "not a complete safetensors file" in run("predict", card, "--device", "cpu", "--checkpoint", "hf:someone/detector").output
    with pytest.raises(CheckpointError, match="no such revision"): fetch_checkpoint("hf:someone/detector@gone")
    with pytest.raises(CheckpointError, match="no such repository"): fetch_checkpoint("hf:someone/nothing")
    hub.models["someone/detector"].commits["e"*40] = {"README.md": b""}
    with pytest.raises(CheckpointError, match="holds no model.safetensors"): fetch_checkpoint("hf:someone/detector")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert fetch_checkpoint(f"hf:someone/detector@{first}")[1].endswith(first)
    with pytest.raises(CheckpointError, match="cannot be reached and the file is not in the cache"): fetch_checkpoint("hf:someone/other")


def test_without_a_token_nothing_is_sent_and_a_private_checkpoint_stays_private(hub, checkpoint, monkeypatch):
    assert run("checkpoint", "push", checkpoint, "someone/detector", "--yes").exit_code == 0
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN" in run("checkpoint", "push", checkpoint, "someone/other", "--yes").output and "someone/other" not in hub.models
    with pytest.raises(CheckpointError, match="no such repository to you"): fetch_checkpoint("hf:someone/detector")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub failed" in run("checkpoint", "push", checkpoint, "someone/other", "--yes").output
