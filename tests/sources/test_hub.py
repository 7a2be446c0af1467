"""The real huggingface_hub against a small hub on the loopback interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.goldens import ERAS, SRC

pytest.importorskip("huggingface_hub", reason="pip install -e '.[hf]'")

COMMIT = "a" * 40
FOLDER = ERAS / "hf_era1_padded"


class SmallHub(ThreadingHTTPServer):
    """Serves one repository the way the hub does, and writes down which files it gave away."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.given = files, []
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: SmallHub

    def log_message(self, *_):
        pass

    def reply(self, body: bytes, status: int = 200, head_only: bool = False, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head_only:
            self.wfile.write(body)

    def do_GET(self, head_only=False):
        path, files = self.path.split("?")[0], self.server.files
        json_type = {"Content_Type": "application/json"}
        if path.startswith("/api/models/owner/name/revision") or path == "/api/models/owner/name":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.reply(json.dumps(info | {"downloads": 0, "private": False}).encode(), **json_type)
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            self.reply(json.dumps(tree).encode(), **json_type)
        elif "/resolve/" in path and (name := path.split(f"/{COMMIT}/")[-1]) in files:
            data = files[name]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.reply(data, 200, head_only, ETag=tag, X_Repo_Commit=COMMIT)
            if not head_only:
                self.server.given.append(name)
        else:
            self.reply(b"", 404, head_only, X_Error_Code="RepoNotFound")

    def do_HEAD(self):
        self.do_GET(head_only=True)


@pytest.fixture
def hub():
    files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}
    files |= {"tokenizer.pkl": (ERAS / "tokenizer" / "tokenizer.pkl").read_bytes()}
    server = SmallHub(files | {"optimizer.pt": b"not wanted", "README.md": b"nor this"})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def microvllm(*words: str, home: Path, port: int) -> subprocess.CompletedProcess:
    """The command in a process of its own, since huggingface_hub reads its settings on import."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    env |= {"PYTHONPATH": str(SRC), "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "microvllm", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=120)


@pytest.mark.slow
def test_a_repository_is_fetched_once_and_only_what_is_needed(hub, tmp_path):
    where = {"home": tmp_path, "port": hub.server_port}
    first = microvllm("info", "owner/name", "--json", **where)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["recipe"]["era"] == "1"
    given = sorted(hub.given)
    assert "model.safetensors" in given and "config.json" in given
    assert "optimizer.pt" not in given and "README.md" not in given
    assert len(set(given)) == len(given)

    args = ("run", "--raw", "--max-tokens", "3", "--temperature", "0", "--json", "-m")
    by_name = microvllm(*args, "owner/name", "Once upon", **where)
    assert by_name.returncode == 0, by_name.stderr
    assert sorted(hub.given) == given  # nothing twice
    local = microvllm(
        *args, str(FOLDER), "--tokenizer-dir", str(ERAS / "tokenizer"), "Once upon", **where
    )
    assert json.loads(by_name.stdout)["token_ids"] == json.loads(local.stdout)["token_ids"]


def test_what_is_not_on_the_hub_and_a_hub_that_is_not_there(hub, tmp_path):
    missing = microvllm("info", "nobody/nothing", home=tmp_path, port=hub.server_port)
    assert missing.returncode == 2
    assert "no repository nobody/nothing" in missing.stderr and missing.stderr.count("\n") == 1
    away = microvllm("info", "owner/name", home=tmp_path, port=9)  # the discard port: refused
    assert away.returncode == 2 and "try again with a network" in away.stderr
