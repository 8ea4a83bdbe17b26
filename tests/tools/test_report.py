"""The report is one whole page that loads nothing, at every stage of a run."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from castalia.errors import UserError
from castalia.tools.records import read_run
from castalia.tools.report import duration, write_report

CONFIG = """version: 1
name: {name}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  vocab_size: 384
training:
  steps: 200
optimizer:
  lr: {lr}
"""


def write_run(path: Path, name: str = "demo", steps: int = 100, lr: float = 1e-3, **changes: Any) -> Path:
    """A run directory with a record at each step."""
    path.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "start", "text": "fresh"}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "tokens": step * 1000,
                "loss": 2 + 6 / step,
                "lr": lr * step / steps,
                "grad_norm": 1 + 1 / step,
                "tokens_per_second": 2000.0,
                "mfu": 0.5,
                "seconds": step / 2,
                "peak_memory": 2**30,
            }
            | changes
        )
        if step % 50 == 0:
            valid = {"loss": 2.5, "bits_per_byte": 1.25, "perplexity": math.exp(2.5), "tokens": 777}
            lines.append({"kind": "valid", "step": step} | valid)
    lines.append({"kind": "event", "step": steps, "event": "end", "text": ""})
    (path / "metrics.jsonl").write_text("".join(json.dumps({"v": 1} | line) + "\n" for line in lines))
    (path / "config.yaml").write_text(CONFIG.format(name=name, lr=lr))
    (path / "environment.json").write_text(json.dumps({"cpu": "a <fast> one", "threads": 2, "devices": []}))
    return path


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch."""

    VOID = {"meta", "link", "input", "br", "line", "path", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_report(list(runs), tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == ["data:,"]
    assert "@import" not in page and "url(" not in page
    for data in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S):
        json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return page


def charts(page: str) -> list[str]:
    return re.findall(r"<h3>([^<]*?) ?<", page)


def test_one_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a"))
    assert "<h1>demo</h1>" in page
    assert "step 100 of 200, finished" in page and "a &lt;fast&gt; one, 2 threads" in page
    for fact in ("100k", "2.0600", "2.5000", "1.2500", "50 s", "2,000", "MFU 50%", "1.00 GiB"):
        assert fact in page, fact
    names = ["Loss", "Validation", "Learning rate", "Gradient norm", "Throughput"]
    names += ["Model FLOPs utilisation", "Peak memory"]
    assert charts(page) == [name for name in names for _ in range(4)]
    assert "num_layers: 2" in page
    # 384 x 32 twice, two layers, the last norm: counted here by hand.
    layer = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    assert read_run(tmp_path / "a").parameters == 2 * 384 * 32 + 2 * layer + 64


def test_validation_is_placed_by_the_tokens_of_training(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.column("valid", "tokens", "loss") == ([50_000.0, 100_000.0], [2.5, 2.5])
    assert run.column("valid", "seconds", "loss")[0] == [25.0, 50.0]
    assert run.flops_per_token
    assert run.column("train", "flops", "lr")[0][:2] == [1000.0 * run.flops_per_token, 2000.0 * run.flops_per_token]
    assert run.at_steps([0, 50.5, 1000], "tokens") == [0, 50_500, 100_000]


def test_several_runs_and_what_differs(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", "one"), write_run(tmp_path / "b", "two", steps=20, lr=2e-3)
    page = page_of(tmp_path, a, b)
    assert "2 runs compared" in page
    assert "two, validation" not in page  # it has none
    assert '<td class="n best"' in page and page.count("<h3>Loss") == 4
    rows = re.findall(r"<tr><th>([\w.]+)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", page)
    assert rows == [("optimizer.lr", "0.001", "0.002")]


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    a, b, c = (write_run(tmp_path / path) for path in ("x/run", "y/run", "y/other"))
    page = page_of(tmp_path, a, b, c, a)  # one that is given twice is shown once
    assert "<h1>3 runs compared</h1>" in page
    assert "demo (x/run), demo (y/run), demo (y/other)" in page
    assert "No setting differs." in page


def test_what_differs_in_the_machine_is_told_too(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", "one"), write_run(tmp_path / "b", "two")
    (b / "environment.json").write_text(
        json.dumps({"cpu": "a <fast> one", "threads": 2, "torch": "9.9", "time": "now"})
    )
    page = page_of(tmp_path, a, b)
    assert "machine and versions" in page and "<th>torch</th><td>\u2013</td><td>9.9</td>" in page
    assert "<th>time</th><td>\u2013" not in page


def add(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"v": 1} | record) + "\n" for record in records)


def test_everything_that_a_run_may_record(tmp_path: Path) -> None:
    """Noise with an open end, timers, tasks, samples, incidents, a resumed run, and a quantity nobody knows."""
    run = write_run(tmp_path / "a")
    noise = {"noise_scale": 5.0, "noise_scale_low": 2.0}
    add(run, *({"kind": "train", "step": 100 + i, "tokens": 10**5, "seconds": 50 + i, **noise} for i in range(1, 4)))
    add(run, {"kind": "train", "step": 104, "tokens": 10**5, "seconds": 54.0, "noise_scale": 6.0, "odd": 1.0})
    add(run, {"kind": "train", "step": 105, "tokens": 10**5, "seconds": 55.0, "odd": 2.0})
    add(run, {"kind": "timers", "step": 105, "seconds": {"forward": 0.1}})
    for step in (104, 105):
        add(run, {"kind": "noise", "step": step, "groups": {"layers": {"value": float(step), "low": 1.0}}})
    add(run, {"kind": "event", "step": 40, "event": "resume", "text": "on"})
    add(run, {"kind": "event", "step": 60, "event": "spike", "text": "step 61"})
    add(run, *({"kind": "tasks", "step": s, "eval/words_acc": s / 200} for s in (50, 100)))
    add(run, {"kind": "samples", "step": 50, "samples": [{"prompt": "A", "text": "old"}]})
    add(run, {"kind": "samples", "step": 100, "samples": [{"prompt": "A", "text": "new"}]})
    (run / "incidents").mkdir()
    documents = [{"data": "x/words", "document": 7}]
    left_out = [{"step": 61, "samples": [{"sample": 1, "documents": documents}]}]
    incident = {"step": 61, "why": "loss 9 is high", "action": "went back to step 40", "left_out": left_out}
    (run / "incidents" / "step-00000061-1.json").write_text(json.dumps(incident))
    other = write_run(tmp_path / "b", "other")
    (other / "results_1.json").write_text(
        json.dumps({"results": {"words": {"acc,none": 0.75, "acc_stderr,none": 0.1}}})
    )
    page = page_of(tmp_path, run, other)
    for name in ("Gradient noise scale", "Time of forward", "Odd", "Noise scale of layers", "words_acc"):
        assert charts(page).count(name) == 4, name
    assert page.count('class="band"') == 4 and page.count("demo: resumed at step 40") == 4
    assert "demo: spike at step 60" in page and "words:7" in page and "went back to step 40" in page
    assert "0.5000<small>step 100</small>" in page and '"n best">0.7500<small>step 100</small>' in page
    assert page.index("<b>A</b>new") < page.index("Of earlier steps") < page.index("<b>A</b>old")


def test_files_that_were_joined_by_hand_read_as_one_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    add(path, {"kind": "train", "step": 50, "loss": 7.0, "tokens": 50_000, "seconds": 25.0})
    steps, losses = read_run(path).column("train", "step", "loss")
    assert steps == sorted(set(steps)) and losses[49] == 7.0


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    whole = (run / "metrics.jsonl").read_bytes()
    cut = whole.index(b'"step": 60')
    (run / "metrics.jsonl").write_bytes(whole[: cut + 4])
    for name in ("config.yaml", "environment.json"):
        (run / name).unlink()
    page = page_of(tmp_path, run)
    assert "step 59, no end recorded yet" in page and "unreadable" not in page


def test_a_torn_line_in_the_middle_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 60, "tokens"', '"step": 60{"v": 1, "tokens"'))
    assert "1 unreadable line(s)" in page_of(tmp_path, run)
    metrics.write_bytes(b"\xff\x00\n3\n" + metrics.read_bytes())  # a damaged disk
    (run / "config.yaml").write_bytes(b"\xff")
    assert "3 unreadable line(s)" in page_of(tmp_path, run)


def test_a_diverged_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a", loss=math.nan, grad_norm=math.inf))
    assert "Gradient norm" not in page and "Learning rate" in page


def test_comparison_and_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    rows = [{"name": "xz -9", "bits_per_byte": 2.5, "note": "alone"}]
    (run / "comparison.json").write_text(json.dumps({"train_bytes": 10**7, "valid_bytes": 10**6, "rows": rows}))
    (run / "samples.json").write_text(json.dumps([{"prompt": "Once <", "text": " upon &", "step": 100}]))
    page = page_of(tmp_path, run)
    assert "10.00 MB of training text, 1.00 MB of unseen text" in page
    assert page.index("<b>demo</b>") < page.index("xz -9")  # best first
    assert "<b>Once &lt;</b> upon &amp;" in page


def test_an_own_row_is_not_doubled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    rows = [{"name": "ours", "bits_per_byte": 1.0, "model": True}, {"name": "xz", "bits_per_byte": 2.0}]
    (run / "comparison.json").write_text(json.dumps({"rows": rows}))
    assert "this run" not in page_of(tmp_path, run)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_run(tmp_path / "a", steps=8_000))
    assert len(page) < 400_000


def test_refusals(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no run is given"):
        write_report([], output)
    with pytest.raises(UserError, match="no metrics.jsonl"):
        write_report([empty], output)
    (empty / "metrics.jsonl").write_text('{"v": 1, "kind": "event", "step": 0, "event": "start"}\n')
    with pytest.raises(UserError, match="no training or evaluation record"):
        write_report([empty], output)
    (empty / "metrics.jsonl").write_text('{"v": 2, "kind": "train", "step": 1, "loss": 3.0}\n')
    with pytest.raises(UserError, match="version 2"):
        write_report([empty], output)
    assert not output.exists()


def test_a_damaged_file_is_said_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    for name, value in (("comparison", "{"), ("environment", "[]"), ("samples", '["text"]')):
        (run / f"{name}.json").write_text(value)
        assert f"{name}.json" in page_of(tmp_path, run), name
        (run / f"{name}.json").unlink()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there cannot be written: Is a directory"):
        write_report([run], tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "there"]


def test_any_name_in_any_locale(tmp_path: Path) -> None:
    output = write_run(tmp_path / "a") / "B\u00e4r.html"
    command = [sys.executable, "-m", "castalia", "report", str(output.parent), "--output", str(output)]
    done = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"") and output.is_file()


def test_durations() -> None:
    cases = {0.5: "0.5 s", 42: "42 s", 725: "12 min 5 s", 12000: "3 h 20 min", 3600: "1 h", 187200: "2 d 4 h"}
    assert {s: duration(s) for s in cases} == cases
