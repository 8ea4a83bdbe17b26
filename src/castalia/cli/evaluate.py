"""`castalia evaluate RUN`: on tasks, texts or a data set; all checkpoints; what it recites of its training data.

RUN (or a Hugging Face folder) ──┬─ --tasks      lm-evaluation-harness    ┬─ --baseline OTHER   paired significance
                                 ├─ --text       texts of any packing     ┘
                                 ├─ --data       a token data set
                                 └─ --memorised  steps of its training
with --all-checkpoints any of these, once per checkpoint, into one table
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castalia.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from castalia.evaluate.subject import Subject, Team

_MODES = ("tasks", "text", "data", "memorised")
# Flags that one of the modes alone reads -> that mode.
_OF = {
    "few_shot": "tasks", "limit": "tasks", "include_path": "tasks", "offline": "tasks", "log_samples": "tasks",
    "by": "text", "text_key": "text", "max_tokens": "data", "samples": "memorised", "steps": "memorised",
}  # fmt: skip
_ALIGN = "{:<34}{:>12}{:>12}{:>11}{:>14}{:>13}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, one checkpoint, Hugging Face folder, or GPT-NeoX checkpoint")
    add("settings", nargs="*", metavar="key=value", help="parallel.tensor, parallel.pipeline, with --procs")
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of lm-evaluation-harness: names, groups, patterns, .yaml files",
    )
    add("--text", nargs="+", metavar="FILE", help="files, folders, globs, URLs, as `castalia prepare` reads them")
    add("--data", metavar="PREFIX", help="token data set made with the run's tokenizer")
    add("--memorised", metavar="k=32,l=32", help="share of training sequences whose l tokens follow k greedily")
    add("--all-checkpoints", action="store_true", help="measure every checkpoint; table and curves go to --output")
    add("--baseline", metavar="OTHER", help="compare with this model, item by item (with --tasks or --text)")
    add("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    add("--few-shot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    add("--limit", type=float, metavar="N", help="documents of each task; below 1 a share of them")
    add("--include-path", metavar="FOLDER", help="further task files")
    add("--offline", action="store_true", help="task data comes from files and the cache alone")
    add("--log-samples", action="store_true", help="also write samples_TASK.jsonl beside --output")
    add("--by", metavar="FIELD", help="count texts by this field of theirs (default: by file)")
    add("--text-key", metavar="KEY", help="field of the text (default: text)")
    add("--stride", type=int, metavar="N", help="tokens that each window scores (default: half of its length)")
    add("--max-tokens", type=int, metavar="N", help="with --data: score only the first so many")
    add("--steps", metavar="N,N,...", help="with --memorised: training steps (default: ten over the whole plan)")
    add("--samples", type=int, metavar="N", help="with --memorised: sequences in all (default: 1000)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="rows of a forward pass; a matter of speed (default: 8)",
    )
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products (default: fp32)")
    add("--add-bos", action="store_true", help="put the tokenizer file's first token before each context")
    add("--procs", type=int, metavar="N", help="processes on this machine that share the requests")
    add("--output", metavar="PATH", help="file, or with --all-checkpoints folder, of results")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    modes = _check(args)
    if args.procs is not None and args.procs > 1 and "WORLD_SIZE" not in os.environ:
        from castalia.parallel.launch import supervise

        return supervise([sys.executable, "-m", "castalia", "evaluate", *_command(args)], args.procs)
    if args.tasks:
        from castalia.evaluate.harness import find_tasks

        names = [name for entry in args.tasks for name in entry.split(",") if name]
        path = None if args.include_path is None else str(Path(args.include_path).expanduser())
        args.found = find_tasks(names, path, args.offline)
    with _team(args) as (team, rank):
        if args.all_checkpoints:
            return _all_checkpoints(args, modes, team, rank == 0)
        result, lines, files = _MEASURES[modes[0]](args, _open(args, args.run, args.step, team), team)
        if rank:
            return 0
        if args.output is not None:
            _write(Path(args.output), files or {"": json.dumps(result, indent=2) + "\n"})
        print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The modes that are asked for; refuses what does not go together."""
    modes = [mode for mode in _MODES if getattr(args, mode)]
    if not modes:
        raise UserError("nothing to measure: give --tasks, --text, --data or --memorised")
    if len(modes) > 1 and not args.all_checkpoints:
        raise UserError(f"--{modes[0]} and --{modes[1]} are two evaluations: give one, or --all-checkpoints for both")
    for flag, mode in _OF.items():
        if getattr(args, flag) not in (None, False) and mode not in modes:
            raise UserError(f"--{flag.replace('_', '-')} is of use with --{mode} alone: leave it out")
    if args.stride is not None and not {"text", "data"} & set(modes):
        raise UserError("--stride is of use with --text and --data alone: leave it out")
    if args.baseline is not None and (args.all_checkpoints or modes[0] not in ("tasks", "text")):
        raise UserError("--baseline compares items of --tasks or --text, of one checkpoint: leave it out")
    if args.all_checkpoints and args.step is not None:
        raise UserError("--all-checkpoints takes every step: leave --step out")
    if args.log_samples and args.output is None:
        raise UserError("--log-samples writes beside --output: give that too")
    for flag in ("max_tokens", "stride", "batch_size", "samples", "procs"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if (args.limit is not None and args.limit <= 0) or (args.few_shot or 0) < 0:
        raise UserError("--limit and --few-shot count documents: give numbers above 0")
    if args.include_path is not None and not Path(args.include_path).expanduser().is_dir():
        raise UserError(f"--include-path {args.include_path}: is not a folder: mend the name")
    if args.data is not None and Path(args.data).is_file() and not Path(f"{args.data}.idx").exists():
        data = Path(args.data)
        if data.suffix in (".bin", ".idx"):
            raise UserError(f"--data {data}: give the data set's prefix, {data.with_suffix('')}")
        raise UserError(f"--data {data}: is a file of texts and no data set of tokens: give --text {data}")
    if args.tasks:
        from castalia.evaluate.harness import need_harness

        need_harness()
    return modes


def _command(args: argparse.Namespace) -> list[str]:
    """The same command line for a process of its own."""
    out = [args.run, *args.settings]
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("run", "settings", "procs", "verb") or value is None or value is False:
            continue
        if value is True:
            out.append(flag)
        else:
            out += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return out


@contextmanager
def _team(args: argparse.Namespace) -> Iterator[tuple[Team | None, int]]:
    """The processes of this job that share the work, joined, and which one this is; None: they share the model."""
    import torch

    from castalia.model.kernels import choose_fp32_matmul
    from castalia.parallel.world import enter_world, joined, launched

    choose_fp32_matmul(torch.device("cpu"))
    if not launched():
        if args.settings:
            raise UserError(f"{args.settings[0]} spreads the model over processes: start them with --procs")
        yield None, 0
        return
    world = enter_world("cpu")
    with joined(world):
        from castalia.evaluate.team import Ranks

        yield (Ranks.of(world) if world.size > 1 and not args.settings else None), world.rank


def _open(args: argparse.Namespace, path: str, step: int | None, team: Team | None) -> Subject:
    import torch

    from castalia.checkpoint import find_checkpoint
    from castalia.evaluate.subject import open_subject

    if args.settings:
        from castalia.evaluate.subject import make_subject
        from castalia.tools.decoding import opened, parallel_of

        found = find_checkpoint(Path(path, "checkpoints"), step, verify=False)
        with opened(path, step, args.precision, parallel_of(args.settings)) as (decoder, tokenizer):
            return make_subject(path, decoder, tokenizer, found.step if found else step, args.add_bos)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    from castalia.tools.decoding import foreign, load_whole

    if foreign(Path(path)):
        from castalia.evaluate.subject import make_subject

        return make_subject(path, *load_whole(path, step, dtype), add_bos=args.add_bos, team=team)
    return open_subject(path, step, dtype, args.add_bos, team)


Measured = tuple[dict[str, Any], list[str], dict[str, str]]
"""For `--json`; lines for people; contents of further files by suffix, "" being --output itself."""


def _tasks(args: argparse.Namespace, subject: Subject, team: Team | None) -> Measured:
    import time

    from castalia.cli.progress import bar
    from castalia.evaluate.compare import compare, paired_items
    from castalia.evaluate.harness import metrics_of, results_json, run_tasks, samples_json

    def measured(of: Subject) -> dict[str, Any]:
        with bar("scoring", "requests") as progress:
            return run_tasks(of, args.found, args.few_shot, args.limit, args.batch_size, progress=progress)

    began = time.time()
    results = measured(subject)
    text = results_json(results, subject.name, began)
    files = {"": text}
    if args.log_samples:
        files |= {f"samples_{task}.jsonl": samples_json(found) for task, found in results["samples"].items()}
    errors = {
        f"{task}_{key.partition('_stderr')[0]}": value
        for task, values in results["results"].items()
        for key, value in values.items()
        if "_stderr" in key and isinstance(value, float)
    }
    lines = [
        f"{name:<44}{value:>10.4f}" + (f" ± {errors[name]:.4f}" if name in errors else "")
        for name, value in metrics_of(results).items()
    ]
    found = json.loads(text)
    if args.baseline is not None:
        others = measured(_open(args, args.baseline, None, team))
        found["comparison"] = {"baseline": args.baseline, "metrics": {}}
        lines += ["", *_comparison_head(args)]
        for task, samples in results["samples"].items():
            pairs = paired_items(samples, others["samples"][task], samples[0].get("metrics", []))
            for metric, (ours, theirs) in pairs.items():
                entry = compare(ours, theirs)
                found["comparison"]["metrics"][f"{task}_{metric}"] = entry.as_dict()
                lines.append(_comparison(f"{task} {metric}", entry))
        files[""] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return found, lines, files


def _text(args: argparse.Namespace, subject: Subject, team: Team | None) -> Measured:
    from castalia.cli.progress import bar
    from castalia.evaluate.compare import compare
    from castalia.evaluate.text import DocumentScore, by_domain, read_texts, score_texts, summary

    def measured(of: Subject) -> list[DocumentScore]:
        with bar("scoring", "windows") as progress:
            texts = read_texts(args.text, args.text_key or "text", args.by)
            return score_texts(of, texts, args.stride, args.batch_size, progress)

    scores = measured(subject)
    domains, whole = by_domain(scores), summary(scores)
    result: dict[str, Any] = {**whole, "domains": domains}
    if args.output is not None:
        result["by_document"] = [s.as_dict() for s in scores]
    lines = [_ALIGN.format(args.by or "file", "documents", "tokens", "loss", "perplexity", "bits/byte")]
    rows = domains if len(domains) == 1 else domains | {"all": whole}
    for name, row in rows.items():
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        cells = (f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", bits)
        lines.append(_ALIGN.format(name[-33:], *cells))
    if args.baseline is not None:
        other = _open(args, args.baseline, None, team)
        theirs = {(s.source, s.number): s for s in measured(other)}
        pairs = [(s, theirs[s.source, s.number]) for s in scores if (s.source, s.number) in theirs]
        lossy = next((pair[0] for pair in pairs if not all(s.whole for s in pair)), None)
        if lossy is not None:
            raise UserError(
                f"{lossy.source}, document {lossy.number}: a tokenizer of the two loses part of it, so bits per byte "
                "do not compare: use texts that both keep"
            )
        values = [[p[i].bits_per_byte for p in pairs] for i in (0, 1)]
        entry = compare(values[0], values[1], [s.bytes for s, _ in pairs])
        result["comparison"] = {"baseline": args.baseline, "bits_per_byte": entry.as_dict()}
        lines += ["", *_comparison_head(args), _comparison("bits per byte", entry)]
    return result, lines, {}


def _comparison_head(args: argparse.Namespace) -> list[str]:
    names = f"A is {args.run}, B is {args.baseline}; p of a paired bootstrap, and of the sign test (McNemar)"
    form = "{:<30}{:>7}{:>10}{:>10}{:>10}{:>24}{:>9}{:>9}"
    return [names, form.format("", "items", "A", "B", "A - B", "95 %", "p", "p sign")]


def _comparison(name: str, entry: Any) -> str:
    between = f"[{entry.low:+.4f}, {entry.high:+.4f}]"
    numbers = f"{entry.items:>7}{entry.a:>10.4f}{entry.b:>10.4f}{entry.difference:>+10.4f}"
    return f"{name[-29:]:<30}{numbers}{between:>24}{entry.p_bootstrap:>9.4f}{entry.p_sign:>9.4f}"


def _data(args: argparse.Namespace, subject: Subject, team: Team | None) -> Measured:
    from castalia.cli.progress import bar
    from castalia.config import load
    from castalia.data.store import TokenStore
    from castalia.evaluate.perplexity import score_store

    if subject.decoder is not None:
        raise UserError("--data takes whole models: leave parallel.tensor and parallel.pipeline out")
    model, tokenizer = subject.model, subject.tokenizer
    store = TokenStore(args.data)
    made_with = (store.info or {}).get("tokenizer", {})
    if made_with and made_with.get("sha256") != tokenizer.identity()["sha256"]:
        raise UserError(
            f"{args.data}: was made with another tokenizer than {args.run}'s: prepare it with the run's own"
        )
    config = Path(args.run, "config.yaml")
    seq_length = load([config]).data.seq_length if config.is_file() else subject.max_length
    with bar("scoring", "tokens") as progress:
        score = score_store(
            model, tokenizer, store, seq_length, args.stride, args.batch_size, args.max_tokens, progress, team
        )
    line = f"{score.loss:.4f} nats per token, perplexity {score.perplexity:.2f} ({score.tokens:,} tokens"
    if score.bits_per_byte is None:
        line = f"{line}; no bits per byte, since the tokenizer does not keep every byte of a text)"
    else:
        line = f"{score.bits_per_byte:.4f} bits per byte, {line}, {score.bytes:,} bytes)"
    context = seq_length - (args.stride or max(1, seq_length // 2))
    which = "each token" if args.max_tokens is None else f"the first {score.tokens:,} tokens"
    note = (
        f"{which} of {args.data} once, with {context} tokens or more before it where there are so many; "
        "validation in training scores samples of its own split, whose first tokens have nothing before them"
    )
    return score.as_dict(), [line, note], {}


def _memorised(args: argparse.Namespace, subject: Subject, team: Team | None) -> Measured:
    from castalia.cli.progress import bar
    from castalia.tools.memorised import lengths_of, scan, shares

    k, l = lengths_of(args.memorised)  # noqa: E741
    steps = None
    if args.steps:
        try:
            steps = [int(step) for step in args.steps.split(",")]
        except ValueError:
            raise UserError(f"--steps {args.steps}: give whole numbers, as 0,100,200") from None
    with bar("reciting", "sequences") as progress:
        found = scan(args.run, subject, k, l, args.samples or 1000, steps, args.batch_size, progress)
    lines = [f"{'step':>9}  {'seen':<5}{'sequences':>10}{'extractable':>13}{'share':>9}"]
    for row in found:
        seen = "yes" if row.seen else "no"
        lines.append(f"{row.step:>9}  {seen:<5}{row.sequences:>10}{row.extractable:>13}{row.share:>9.4f}")
    return {"k": k, "l": l, **shares(found), "steps": [row.as_dict() for row in found]}, lines, {}


_MEASURES: dict[str, Callable[[argparse.Namespace, Subject, Team | None], Measured]] = {
    "tasks": _tasks,
    "text": _text,
    "data": _data,
    "memorised": _memorised,
}
_KEPT = ("loss", "perplexity", "bits_per_byte", "memorised_seen", "memorised_unseen")


def _all_checkpoints(args: argparse.Namespace, modes: Sequence[str], team: Team | None, first: bool) -> int:
    from castalia.evaluate.harness import metrics_of
    from castalia.tools.dynamics import measure_all

    output = Path(args.output or Path(args.run, "dynamics"))

    def measure(step: int) -> dict[str, float]:
        row: dict[str, float] = {}
        subject = _open(args, args.run, step, team)
        for mode in modes:
            found = _MEASURES[mode](args, subject, team)[0]
            if mode == "tasks":
                row |= metrics_of(found)
            else:
                row |= {k: found[k] for k in _KEPT if found.get(k) is not None}
            if mode == "text" and len(found["domains"]) > 1:
                row |= {f"loss_{name}": values["loss"] for name, values in found["domains"].items()}
        return row

    def say(row: dict[str, Any]) -> None:
        if first and not args.json:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
            print(f"step {row['step']}: {shown}", flush=True)

    rows = measure_all(Path(args.run), measure, output, first, say)
    if first:
        print(json.dumps({"rows": rows}) if args.json else f"{output}: dynamics.csv, dynamics.json, dynamics.html")
    return 0


def _write(path: Path, files: dict[str, str]) -> None:
    """Results at `path`, or, where that is a folder, in files of it named as the harness does."""
    import datetime

    from castalia.config.files import write_text

    folder = path if path.is_dir() else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().isoformat().replace(":", "-")
    for suffix, text in files.items():
        target = folder / suffix
        if not suffix:
            target = path / f"results_{now}.json" if path.is_dir() else path
        write_text(target, text)
        print(f"castalia: {target}", file=sys.stderr)
