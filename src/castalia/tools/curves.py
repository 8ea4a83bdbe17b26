"""The same run on one process and in four layouts of two, to the end: their curves in one picture.

    python -m castalia.tools.curves [--steps 200] [--runs FOLDER] [--output docs/images/layouts.svg]

    the standard library's text ─> tokens ─> castalia train, five times ─> losses ─> picture, table

`verify layouts` compares everything over a few steps of a tiny model; this shows that the small differences
of rounding stay small over a whole run on real text. Runs that are in the folder already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from castalia.errors import CheckFailed
from castalia.tools.picture import Panel, picture
from castalia.tools.plots import Series
from castalia.train.metrics import read_metrics

ONE = "one process"
RUNS: dict[str, tuple[str, int, str | None]] = {
    ONE: ("one", 1, None),
    "ZeRO 3 on 2": ("zero3", 2, "parallel.zero=3"),
    "tensor parallel on 2": ("tp2", 2, "parallel.tensor=2"),
    "pipeline of 2": ("pp2", 2, "parallel.pipeline=2"),
    "context parallel on 2": ("cp2", 2, "parallel.context=2"),
}
"""Label -> folder, processes, setting."""
LARGEST = 1e-4
"""Nats by which no loss may be off."""

Losses = dict[int, float]


def train_all(folder: Path, steps: int) -> None:
    """Prepare the text and train the runs that are not there yet.

    Raises:
        CheckFailed: a run failed.
    """
    config = folder / "run.yml"
    if not config.exists():
        _write(folder, config, steps)
    for name, processes, setting in RUNS.values():
        run = folder / name
        if (run / "metrics.jsonl").exists() and steps in losses(run):
            continue
        command = [sys.executable, "-m", "castalia", "train", str(config), f"output={run}", "--no-report", "--quiet"]
        command += [f"training.steps={steps}", "--procs", str(processes), *([setting] if setting else [])]
        print(f"{name}: running", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise CheckFailed(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")


def _write(folder: Path, config: Path, steps: int) -> None:
    from itertools import islice

    from castalia.data.corpora import write_corpus
    from castalia.data.prepare import prepare
    from castalia.data.sources import iter_documents
    from castalia.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

    write_corpus(folder / "corpus")
    texts, vocabulary = folder / "corpus" / "train.jsonl", folder / "tokenizer.json"
    save_tokenizer(train_bpe((d.text for d in islice(iter_documents([texts]), 200)), 4096), vocabulary)
    prepare([texts], folder / "tokens", load_tokenizer(str(vocabulary)), overwrite=True)
    values = {
        "version": 1,
        "name": "layouts",
        "data": {"train_paths": [str(folder / "tokens")], "seq_length": 64},
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        "training": {"steps": steps, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 0.1},
        "checkpoint": {"interval": None},
        "logging": {"interval": 1},
    }
    config.write_text(json.dumps(values, indent=2), encoding="utf-8")


def losses(run: Path) -> Losses:
    """Training loss by step, in nats per token."""
    return {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r.get("kind") == "train"}


def differences(curves: Mapping[str, Losses]) -> dict[str, Losses]:
    """How far each layout's loss is from one process's, by step, in nats per token.

    Raises:
        CheckFailed: the runs have other steps, or one is off by more than LARGEST.
    """
    out: dict[str, Losses] = {}
    for label, curve in curves.items():
        if curve.keys() != curves[ONE].keys():
            raise CheckFailed(f"{label}: has {len(curve)} steps, {ONE} has {len(curves[ONE])}")
        if label != ONE:
            out[label] = {step: abs(loss - curves[ONE][step]) for step, loss in curve.items()}
            if not max(out[label].values()) <= LARGEST:
                raise CheckFailed(f"{label}: off by {max(out[label].values()):.1e} nats, more than {LARGEST:g}")
    return out


def draw(curves: Mapping[str, Losses]) -> str:
    """The losses on top of each other, and below them how far each layout is from one process."""
    colours = {label: i for i, label in enumerate(curves)}
    both = [
        [Series(label, list(curve), list(curve.values()), colours[label]) for label, curve in of.items()]
        for of in (curves, differences(curves))
    ]
    panels = [
        Panel("training loss, nats per token: five runs on top of each other", both[0], stacked=True),
        Panel("difference to one process, nats per token (what is exactly equal leaves a gap)", both[1], log_y=True),
    ]
    return picture("Training loss of one run in five layouts, and their differences", panels, "step")


def main() -> int:
    """Train what is not there yet, draw, and say how far apart they are."""
    parser = argparse.ArgumentParser(prog="python -m castalia.tools.curves", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, help="where the runs are, or are made (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/layouts.svg"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="castalia-curves-") as temporary:
        folder = args.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train_all(folder, args.steps)
        curves = {label: losses(folder / name) for label, (name, _, _) in RUNS.items()}
    args.output.write_text(draw(curves), encoding="utf-8")
    for label, of in differences(curves).items():
        print(f"{label}: at most {max(of.values()):.1e} nats from one process over {len(of)} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
