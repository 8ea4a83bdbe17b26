"""The long checks: each a function that returns a table, kept with date, commit and command.

    python -m castalia.tools.certify [NAME ...] [--again]

`make test` runs short forms of the same machinery. A check that has a certificate for the
commit at hand is not run again, so a campaign that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from castalia.errors import CheckFailed, UserError
from castalia.tools.kills import kill_campaign
from castalia.train.environment import environment

KILLS = 30


def certify_training_kills(folder: Path, kills: int = KILLS) -> str:
    """SIGKILL at random moments of training and of saving; the final weights must be bit-equal."""
    import torch

    from castalia.checkpoint import find_checkpoint, load_checkpoint, tensor_shapes

    config = write_small_run(folder)

    def final(run: str) -> dict[str, torch.Tensor]:
        found = find_checkpoint(folder / run / "checkpoints")
        if found is None or found.step != STEPS:
            raise CheckFailed(f"{folder / run}: did not reach step {STEPS}")
        tensors = {name: torch.empty(shape) for name, shape in tensor_shapes(found.path).items()}
        load_checkpoint(found.path, tensors)
        return tensors

    def command(run: str) -> list[str]:
        verb = [sys.executable, "-m", "castalia", "train", str(config), "--quiet", "--no-report"]
        return [*verb, f"output={folder / run}"]

    subprocess.run(command("whole"), check=True, capture_output=True)
    metrics = folder / "killed" / "metrics.jsonl"
    left = {"during a save": 0, "otherwise": 0}

    def look(_: int) -> None:
        writing = list((folder / "killed" / "checkpoints").glob(".writing-*"))
        left["during a save" if writing else "otherwise"] += 1

    campaign = kill_campaign(
        command("killed"), lambda: metrics.stat().st_size if metrics.exists() else 0, kills, longest=1.5, between=look
    )
    expected, found = final("whole"), final("killed")
    differing = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    if differing:
        raise CheckFailed(f"{len(differing)} tensors differ after {kills} kills, the first is {differing[0]}")
    rows = [
        ("kills", str(campaign.kills)),
        ("of these while a checkpoint was being written", str(left["during a save"])),
        ("steps of the run, each saved", str(STEPS)),
        ("tensors compared, bit for bit", f"{len(expected)}, all equal"),
    ]
    return table(("training and saving", ""), rows)


def certify_preparation_kills(folder: Path, kills: int = KILLS) -> str:
    """SIGKILL at random moments of preparation, which goes on each time; the data set must come out byte-identical."""
    from itertools import islice

    from castalia.data.corpora import write_corpus
    from castalia.data.sources import iter_documents
    from castalia.data.store import is_finished
    from castalia.data.tokenizer import save_tokenizer, train_bpe

    write_corpus(folder / "corpus")
    source, vocabulary = folder / "corpus" / "train.jsonl", folder / "tokenizer.json"
    save_tokenizer(train_bpe((d.text for d in islice(iter_documents([source]), 40)), 2048), vocabulary)

    def command(prefix: str) -> list[str]:
        verb = [sys.executable, "-m", "castalia", "prepare", str(source), "--tokenizer", str(vocabulary)]
        # The plain encoder, since the quick one is done before it can be killed.
        return [*verb, "--encoder", "plain", "--output", str(folder / prefix)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    names = ("bin", "idx", "json")
    partial = folder / "killed.bin.partial"
    journal = folder / "killed.journal.partial"
    unfinished = noted = 0

    def look(_: int) -> None:
        nonlocal unfinished, noted
        if is_finished(folder / "killed"):
            compare()
            begin_again()
            return
        unfinished += 1
        noted += journal.exists() and journal.read_bytes().count(b"\n") > 1

    def compare() -> None:
        for name in names:
            if (folder / f"whole.{name}").read_bytes() != (folder / f"killed.{name}").read_bytes():
                raise CheckFailed(f"killed.{name} differs from whole.{name} after being killed")

    def begin_again() -> None:
        for path in folder.glob("killed.*"):
            path.unlink()

    def between_starts() -> None:
        if is_finished(folder / "killed"):
            compare()
            begin_again()

    def at_work() -> tuple[bool, int]:
        return partial.exists(), partial.stat().st_mtime_ns if partial.exists() else 0

    campaign = kill_campaign(command("killed"), at_work, kills, longest=2.5, between=look, before=between_starts)
    compare()
    rows = [
        ("kills", str(campaign.kills)),
        ("of these before the data set was finished", str(unfinished)),
        ("of these with work noted that the next start went on from", str(noted)),
        ("bytes of text", f"{json.loads((folder / 'whole.json').read_text())['bytes']:,}"),
        ("files compared", "bin, idx, json: byte-identical"),
    ]
    return table(("preparation", ""), rows)


def certify_model_matrix(folder: Path) -> str:
    """Every norm x position x activation x residual: learns to copy, generates as it trains, right gradients."""
    from castalia.tools import model_matrix

    return model_matrix.certify_model_matrix(folder)


def certify_index_mutations(folder: Path, count: int = 10_000) -> str:
    """Indices of data sets, damaged at random: refused in words, or the right ids."""
    from castalia.tools.mutations import mutate_indices

    result = mutate_indices(folder, count)
    rows = [
        ("damaged indices", f"{count:,}"),
        ("refused when opened whole", f"{result['refused']:,}"),
        ("refused when opened lazily and read", f"{result['refused_lazily']:,}"),
        ("harmless both ways: the right ids", f"{result['harmless']:,}"),
        ("wrong ids, crashes, allocations above 32 MiB", "0"),
    ]
    return table(("index files", ""), rows)


def certify_families(folder: Path) -> str:
    """Every family: logits of transformers, each tensor counts, learns to copy, generates as it trains, gradients."""
    from castalia.tools import families

    return families.certify_families(folder, say=lambda text: print(text, file=sys.stderr, flush=True))


def certify_smollm2(folder: Path) -> str:
    """A released model, imported: the logits, the English and the LAMBADA answers of transformers."""
    from castalia.tools import import_smollm2

    return import_smollm2.certify_smollm2(folder, say=lambda text: print(text, file=sys.stderr, flush=True))


def certify_harness(folder: Path) -> str:
    """Tasks of lm-evaluation-harness: the accuracies and log-likelihoods of its own backend, at every batch size."""
    from castalia.tools import harness_certificate

    return harness_certificate.certify_harness(folder, say=lambda text: print(text, file=sys.stderr, flush=True))


STEPS = 800


def write_small_run(folder: Path) -> Path:
    """A tiny data set, and a configuration that saves after every step."""
    path = folder / "run.yml"
    path.write_text(json.dumps(small_run(folder), indent=2), encoding="utf-8")
    return path


def small_run(folder: Path) -> dict[str, Any]:
    """A tiny data set, and the values of a configuration that saves after every step."""
    import random

    from castalia.data.prepare import prepare
    from castalia.data.tokenizer import load_tokenizer

    draw = random.Random(0)
    text = "the cat sat on a mat and saw that it was not a hat but an old rat in the hall"
    words = text.split()
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for i in range(80):
        (texts / f"{i:02d}.txt").write_text(" ".join(draw.choice(words) for _ in range(80)), encoding="utf-8")
    prepare([texts], folder / "tokens", load_tokenizer("byte"), overwrite=True)
    return {
        "data": {"path": str(folder / "tokens"), "split": "80,20,0", "seq_length": 64},
        "model": {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "residual": "parallel"},
        "training": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 4},
        "evaluation": {"interval": 7, "batches": 1},
        "checkpoint": {"interval": 1, "keep_last": 3},
        "logging": {"interval": 1},
        "performance": {"threads": 1, "peak_flops": 1e11},
    }


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def certify_source_mutations(folder: Path) -> str:
    """Corpora of every kind, damaged at random: read rightly or refused in words, never silence or a crash."""
    from castalia.tools.source_faults import MUTATIONS, read_mutations

    found = read_mutations(folder, MUTATIONS)
    rows = [(name, f"{counts['read']:,}", f"{counts['refused']:,}") for name, counts in found.items()]
    total = [sum(counts[what] for counts in found.values()) for what in ("read", "refused")]
    return table(("file", "read", "refused"), [*rows, ("all", *(f"{count:,}" for count in total))])


def certify_layouts(folder: Path) -> str:
    """Every layout x several models against one process: losses, gradients and updated weights, fp32."""
    from castalia.tools import layouts

    return layouts.certify_layouts(folder)


def certify_checkpoint_kills(folder: Path, kills: int = 200) -> str:
    """SIGKILL in the midst of saves: a whole checkpoint is found each time, bit-equal to that of a run left alone."""
    from castalia.tools.checkpoint_faults import kill_saves

    counts = kill_saves(write_small_run(folder), folder, kills)
    rows = [
        ("kills while a checkpoint was being written", str(counts["kills"])),
        ("kills just after", str(counts["others"])),
        ("starts that did not find a whole checkpoint, or an older one than before", "0"),
        (
            "checkpoints found after a kill and compared with the same step of a run left alone",
            str(counts["checkpoints"]),
        ),
        ("tensors of each, parameters and moments, bit for bit", f"{counts['tensors']}, all equal"),
        ("the last step, after all kills", "equal"),
    ]
    return table(("saving in the background", ""), rows)


def certify_checkpoint_damage(folder: Path, flips: int = 200) -> str:
    """Every file damaged in turn is named; a full disk and a store that refuses cost a warning, nothing else."""
    from castalia.tools.checkpoint_faults import TINY, damage, full_disk, refusing_uploads
    from castalia.train.run import train

    config = write_small_run(folder)
    train(config, *TINY, "training.steps=3", f"output={folder / 'run'}", quiet=True)
    found = damage(folder / "run", folder / "scratch", flips)
    rows = [(name, *(str(counts[what]) for what in ("flipped", "cut", "removed"))) for name, counts in found.items()]
    said = "Found and named, and the checkpoint before is taken:\n\n"
    said += table(("file", "bytes flipped", "cut short", "removed"), rows)
    full, refused = full_disk(config, folder / "full"), refusing_uploads(config, folder / "far")
    said += "\nTraining went on, and the checkpoint before stayed whole. A file size limit, then none again; "
    said += f"{len(full)} saves failed:\n\n> {full[0]}\n\nAn object store that refuses writing, then reading, then "
    return said + f"fails once; {len(refused)} uploads failed, all came later:\n\n> {refused[0]}\n"


def certify_reshard(folder: Path) -> str:
    """Saved under each layout in the background, loaded under each: parameters and optimizer bit-equal."""
    from castalia.tools import reshard

    return reshard.certify_reshard(folder)


def certify_trackers(folder: Path) -> str:
    """The same run in TensorBoard, W&B, Comet, MLflow and Trackio at once: each read back, without a network."""
    from castalia.tools import tracker_numbers

    return tracker_numbers.certify_trackers(folder)


def certify_plan(folder: Path) -> str:
    """What `castalia plan` predicts: bytes of state exactly, peaks of activations and times of steps with errors."""
    from castalia.tools import plan_certificate

    return plan_certificate.certify_plan(folder)


CERTIFICATES: dict[str, Callable[[Path], str]] = {
    "layouts": certify_layouts,
    "training_kills": certify_training_kills,
    "checkpoint_kills": certify_checkpoint_kills,
    "checkpoint_damage": certify_checkpoint_damage,
    "reshard": certify_reshard,
    "plan": certify_plan,
    "preparation_kills": certify_preparation_kills,
    "model_matrix": certify_model_matrix,
    "families": certify_families,
    "harness": certify_harness,
    "smollm2": certify_smollm2,
    "index_mutations": certify_index_mutations,
    "source_mutations": certify_source_mutations,
    "trackers": certify_trackers,
}


def main() -> int:
    """Run the checks that are named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m castalia.tools.certify", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CERTIFICATES)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("docs/certificates"))
    parser.add_argument("--again", action="store_true", help="run what has a certificate for this commit, too")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CERTIFICATES]
    if unknown:
        print(f"unknown check '{unknown[0]}'; known: {', '.join(CERTIFICATES)}", file=sys.stderr)
        return 2
    failed = 0
    for name in args.names or CERTIFICATES:
        failed += not _certify(name, args.output, args.again)
    return 4 if failed else 0


def _certify(name: str, output: Path, again: bool) -> bool:
    facts = environment()
    git = facts.get("git") or {}
    commit = f"{git.get('commit', 'unknown')}{' with changes' if git.get('dirty') else ''}"
    path = output / f"{name}.md"
    if not again and path.exists() and f"commit {commit}\n" in path.read_text(encoding="utf-8"):
        print(f"{name}: has a certificate for this commit", file=sys.stderr)
        return True
    print(f"{name}: running", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="castalia-certify-") as folder:
        try:
            body = CERTIFICATES[name](Path(folder))
        except UserError as error:
            print(f"{name}: FAILED: {error}", file=sys.stderr)
            return False
    output.mkdir(parents=True, exist_ok=True)
    doc = (CERTIFICATES[name].__doc__ or "").strip()
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    head = f"# {name}\n\n{doc}\n\n- {today}, commit {commit}\n- `python -m castalia.tools.certify {name}`\n"
    path.write_text(f"{head}- torch {facts['torch']}, {facts.get('cpu', 'unknown CPU')}\n\n{body}", encoding="utf-8")
    print(f"{name}: {path}", file=sys.stderr)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
