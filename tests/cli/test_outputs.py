"""What is done with a finished run: evaluate, export, generate; and that progress is shown on a terminal alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from castalia.cli import main
from castalia.cli.progress import bar, stages
from castalia.data.prepare import prepare
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CheckFailed
from castalia.tools import export
from castalia.train.run import train


class Terminal(io.StringIO):
    """A standard error that people look at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with a context of 32; its data set is `tokens` beside it."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "text.txt").write_text("the cat sat on a mat and saw that it was not a hat\n" * 40)
    prepare([folder / "text.txt"], folder / "tokens", load_tokenizer("byte"))
    values = {
        "output": str(folder / "run"),
        "data": {"path": str(folder / "tokens"), "split": "1,0,0", "seq_length": 32},
        "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4},
        "training": {"steps": 2, "batch_size": 4},
        "performance": {"threads": 1, "peak_flops": 1e11},
    }
    (folder / "run.yml").write_text(yaml.safe_dump(values))
    train(folder / "run.yml", quiet=True)
    return folder / "run"


def terminal(monkeypatch) -> Terminal:
    """Called in the test, since pytest gives each phase of a test a standard error of its own."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    return made


def test_progress_is_for_terminals(capsys) -> None:
    with bar("scoring", "tokens") as progress, stages() as say:
        assert progress is None and say is None
    assert capsys.readouterr() == ("", "")


def test_evaluation(run, capsys) -> None:
    argv = ["evaluate", str(run), "--data", str(run.with_name("tokens"))]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["tokens"] == 2041
    assert main(argv) == 0
    assert f"each token of {run.with_name('tokens')} once, with 16 tokens or more" in capsys.readouterr().out
    assert main([*argv, "--max-tokens", "1000"]) == 0
    out = capsys.readouterr().out
    assert "(1,000 tokens, 1,000 bytes)" in out and "the first 1,000 tokens of" in out


def test_evaluation_on_a_terminal(run, monkeypatch) -> None:
    shown = terminal(monkeypatch)
    assert main(["evaluate", str(run), "--data", str(run.with_name("tokens"))]) == 0
    assert "scoring" in shown.getvalue() and "2,041 of 2,041 tokens" in shown.getvalue()


def test_export(run, tmp_path, capfd) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(f"{tmp_path / 'out'}: logits equal those of transformers to ") and out.count("\n") == 1
    assert err == ""  # transformers draws bars of its own, unless told not to
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["checked"] and parity["largest_relative_difference"] <= parity["tolerance"]
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "exists already" in capfd.readouterr().err


def test_export_on_a_terminal(run, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    export.export_run(run, tmp_path / "a", check=False, say=said.append)
    assert said == ["loading the run", "writing the weights"]
    shown = terminal(monkeypatch)
    assert main(["export", str(run), str(tmp_path / "b")]) == 0
    assert "comparing logits with transformers" in shown.getvalue()


def test_an_export_that_differs_is_not_left(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="gives other logits"):
        export.export_run(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_generation_fills_the_room_there_is(run, capsys) -> None:
    argv = ["generate", str(run), "--no-stop", "--prompt"]
    assert main([*argv, "x" * 30, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "length" and len(answer["text"]) <= 2
    assert main([*argv, "x" * 32]) == 2
    assert "32 tokens, which leaves no room in the 32 that" in capsys.readouterr().err
