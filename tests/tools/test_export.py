"""What is exported is what transformers computes, in shards, in any dtype; a wrong mapping refuses; and the push."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from castalia.checkpoint import save_checkpoint
from castalia.cli import main
from castalia.config.load import check_values
from castalia.config.render import to_yaml
from castalia.convert import huggingface
from castalia.convert.huggingface_files import open_folder
from castalia.convert.table import Row
from castalia.data.tokenizer import load_tokenizer
from castalia.data.tokenizer.tiktoken import TiktokenTokenizer, complete_file
from castalia.errors import CheckFailed, UserError
from castalia.tools import export, families
from castalia.tools.export_push import push
from castalia.tools.export_tokenizer import SAMPLES, tokenizer_json

pytest.importorskip("transformers", reason="exports are checked against transformers")


def write_run(folder: Path, fields: dict[str, Any], vocabulary: int = 257) -> Path:
    """A run of random weights, with bytes for tokens."""
    values = {"version": 1, "model": fields | {"vocab_size": vocabulary}, "data": {"seq_length": 32}}
    config = check_values(values, "here")
    model = families.random_model(config.model)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    state = {
        **{"version": 1, "step": 5, "updates": 5, "tokens": 5120, "config": config.model_dump(), "journal": []},
        **{"tokenizer": load_tokenizer("byte").identity(), "data": {"corpus/tokens": "0123abcd"}},
        "versions": {"castalia": "0", "torch": "0"},
    }
    save_checkpoint(folder / "checkpoints", 5, {f"model.{n}": t for n, t in model.state_dict().items()}, state)
    line = {"kind": "valid", "step": 5, "loss": 1.25, "perplexity": 3.49}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("exports") / "run", families.FAMILIES["llama"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_card_and_dtype(run, tmp_path, dtype) -> None:
    argv = ["export", str(run), str(tmp_path / "out"), "--dtype", dtype, "--shard-size", "60KB"]
    assert main(argv) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / "out" / name).stat().st_size < 80_000 for name in files)
    assert {t.dtype for t in open_folder(tmp_path / "out").values()} == {export.DTYPES[dtype]}
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["checked"] and parity["dtype"] == dtype and "equal" in parity["tokenizer"]
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("5,120", "0123abcd", "1.2500", "LlamaForCausalLM", "# license"):
        assert said in card
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 256


def test_a_wrong_mapping_refuses(run, tmp_path, monkeypatch) -> None:
    """Two tensors of one shape, swapped in the table."""
    right = huggingface.ARCHITECTURES["llama"]

    def rows(model):
        table = right.rows(model)
        first, second = ("layers.1.mlp.gate.weight",), ("layers.1.mlp.up.weight",)
        theirs = {row.ours: row.theirs for row in table}
        swapped = {first: theirs[second], second: theirs[first]}
        return [Row(r.ours, swapped.get(r.ours, r.theirs), r.to_theirs, r.to_ours) for r in table]

    wrong = type(right)(**{**vars(right), "rows": rows})
    monkeypatch.setitem(huggingface.ARCHITECTURES, "llama", wrong)
    with pytest.raises(CheckFailed, match="gives other logits"):
        export.export_run(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export.export_run(run, tmp_path / "out", check=False)["checked"] is False
    assert "were not compared" in (tmp_path / "out" / "README.md").read_text()


def test_too_large_to_compare(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "prod", lambda shape: 10**15)
    with pytest.raises(UserError, match="say --no-check"):
        export.export_run(run, tmp_path / "out")


def test_tiktoken_ranks_become_a_tokenizer_with_the_same_ids() -> None:
    pytest.importorskip("tiktoken")
    import tokenizers

    joined = [
        b"th",
        b"he",
        b"the",
        b" t",
        b" the",
        b"in",
        b"ing",
        b"ng",
        b"  ",
        b"on",
        b"\xc3\xa9",
        b"ello",
        b"ll",
        b"lo",
    ]
    ranks = {bytes([i]): i for i in range(256)} | {entry: 256 + i for i, entry in enumerate(joined)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ours = TiktokenTokenizer(complete_file("small", pattern, {"<|endoftext|>": 300}, ranks))
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json(ours).decode())
    for text in (*SAMPLES, "the hello thing, then on; ethe  the"):
        assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.token_to_id("<|endoftext|>") == 300


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload asks for: repository, how to send each file, large files, a commit."""

    large: dict[str, bytes]
    commits: list[list[dict[str, Any]]]
    refuse: bool

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._body()
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.refuse or self.headers.get("Authorization") != "Bearer hf_secret":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self._answer({"url": f"{here}/someone/small", "name": "someone/small"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{here}/large/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commits.append([json.loads(line) for line in body.splitlines() if line])
            self._answer({"commitUrl": f"{here}/someone/small/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.large[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "someone/small", "sha": "0" * 40, "siblings": [], "name": "someone", "orgs": []})

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    constants = pytest.importorskip("huggingface_hub").constants
    Hub.large, Hub.commits, Hub.refuse = {}, [], False
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield Hub
    server.shutdown()
    server.server_close()


def test_push(run, tmp_path, hub, capfd) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--push", "someone/small"]) == 0
    assert "uploaded to" in capfd.readouterr().out
    (commit,) = hub.commits
    sent = {line["value"]["path"]: line["value"] for line in commit if line["key"] in ("file", "lfsFile")}
    assert sent.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert base64.b64decode(sent["config.json"]["content"]) == (tmp_path / "out" / "config.json").read_bytes()
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hub.large == {sent["model.safetensors"]["oid"]: weights}


def test_a_refused_push_leaves_the_folder(run, tmp_path, hub, capfd) -> None:
    hub.refuse = True
    assert main(["export", str(run), str(tmp_path / "out"), "--no-check", "--push", "someone/small"]) == 2
    error = capfd.readouterr().err
    assert "was not uploaded" in error and "stays" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "parity.json").is_file() and hub.commits == []
    with pytest.raises(UserError, match="was not uploaded"):
        push(tmp_path / "nothing", "someone/small")
