"""`castalia profile`: a step of the user's own batch; what cannot be done is one sentence."""

from __future__ import annotations

import json

from castalia.cli import main

SMALL = (
    "model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, vocab_size: 384}\n"
    "data: {path: DATA, seq_length: 32}\ntraining: {steps: 5, batch_size: 4, micro_batch_size: 2, precision: fp16}\n"
    "performance: {threads: 1, device: cpu}\nlogging: {}\nparallel: {zero: 1}\n"
)


def test_a_step_of_one_s_own(tmp_path, capsys, monkeypatch) -> None:
    from castalia.data.prepare import prepare
    from castalia.data.tokenizer import load_tokenizer

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 80)
    prepare([tmp_path / "a.txt"], tmp_path / "tokens", load_tokenizer("byte"))
    (tmp_path / "a.yml").write_text(SMALL.replace("DATA", "tokens"))
    before = {p.name for p in tmp_path.iterdir()}
    files = ["--html", "p.html", "--trace", "t.json", "--memory", "m.json"]
    assert main(["profile", "a.yml", "data.split=100,0,0", "--repeat", "1", "--json", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "the tokens of step 5" and found["tokens"] == 128 and found["micro_batches"] == 2
    assert set(found["phases"]) == {"forward", "backward", "reduce", "clip", "optimizer"}
    assert found["root"]["flops"]["backward"] > 0 == found["root"]["flops"]["recompute"]
    assert any(note.startswith("parallel: left out") for note in found["notes"])
    assert {p.name for p in tmp_path.iterdir()} - before == {"p.html", "t.json", "m.json"}
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    ranges = {"step 1", "forward", "backward", "optimizer", "layers.1.mlp.up forward", "layers.0.attention backward"}
    assert ranges <= {e.get("name") for e in events}
    memory = json.loads((tmp_path / "m.json").read_text())
    assert memory["peak_bytes"] > 0 and memory["points"]
    assert main(["profile", "a.yml", "data.path=elsewhere", "--repeat", "0", "--depth", "1", "--top", "0"]) == 0
    out = capsys.readouterr().out
    assert "random tokens, as elsewhere is not here" in out and "mlp" not in out


def test_what_cannot_be_done(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "a.yml").write_text(SMALL.replace("path: DATA, ", "").replace(", vocab_size: 384", ""))
    assert main(["profile", str(tmp_path / "a.yml")]) == 2
    assert "model.vocab_size is not set" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "a.yml"), "--html", str(tmp_path / "no" / "p.html")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "a.yml"), "--depth", "-1"]) == 2
    assert "--depth -1" in capsys.readouterr().err
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["profile", str(tmp_path / "a.yml"), "model.vocab_size=64"]) == 2
    assert "looks at one process" in capsys.readouterr().err
