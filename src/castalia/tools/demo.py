"""From nothing to a trained model on this machine: what `castalia demo` does, step by step.

    corpus ─> train.jsonl, valid.jsonl ─> tokenizer.json ─> train.bin, valid.bin
                                                                  │ as many steps as fit in the time
       report.html <─ bits per byte beside xz and zstd, a sample <─ trained run

The default corpus is the Python standard library's own text, so no network is needed.
Validation files are never seen in training; the compressors get the same training text.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.checkpoint import RunLock
from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.config.load import check_values
from castalia.errors import UserError

VOCAB_SIZE = 4096
VALID_FRACTION = 0.05
MIN_VALID_BYTES = 2_000
LEAST_SECONDS = 60.0  # that the model and the compressors have for the comparison, however short the training


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: the run's folder, the report, and the figures that were printed."""

    run: Path
    report: Path
    comparison: dict[str, Any]
    sample: str


def run_demo(
    folder: Path,
    corpus: Path | None,
    minutes: float,
    say: Callable[[str], None],
    prompt: str = "def ",
    overrides: Sequence[str] = (),
) -> DemoResult:
    """Prepare, train, compare and report.

    Args:
        folder: everything is written below it (`data/demo` and `runs/demo`).
        corpus: the user's own text (a file or folder); None: the standard library's.
        minutes: how long to train.
        say: takes each line for people.
        prompt: what the sample at the end continues.
        overrides: `key=value` settings laid over configs/demo.yml.

    Raises:
        UserError: the corpus cannot be read or is too small, or another process trains in runs/demo.
    """
    data, run_dir = folder / "data" / "demo", folder / "runs" / "demo"
    say("[1/5] corpus")
    train_text, valid_text = _write_corpus(data, corpus, say)
    say("[2/5] tokenizer")
    tokenizer = _train_tokenizer(data, say)
    say("[3/5] token data sets")
    _prepare(data, tokenizer, say)
    say(f"[4/5] training for about {_in_words(minutes)}")
    config = _config(data, run_dir, overrides)
    precision, steps, rate = _affordable(config, tokenizer.vocab_size, 60 * minutes, say)
    values = config.model_dump()
    values["training"] |= {"steps": steps, "precision": precision}
    full = check_values(values, "castalia demo")
    room = full.max_positions - len(tokenizer.encode(prompt)) - 1
    if room < 1:
        raise UserError(f"--prompt is too long: the demo's model sees {full.max_positions} tokens at once")
    _make_room(run_dir)
    run = _train(full)
    say("[5/5] comparison on the unseen files")
    comparison = _compare(run, data, (train_text, valid_text), rate, max(60 * minutes, LEAST_SECONDS), say)
    (run_dir / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    sample = _sample(run_dir, prompt, min(160, room))
    (run_dir / "samples.json").write_text(json.dumps([{"prompt": prompt, "text": sample}]) + "\n", encoding="utf-8")
    from castalia.tools.report import write_report

    report = run_dir / "report.html"
    write_report([run_dir], report)
    return DemoResult(run_dir, report, comparison, sample)


def _in_words(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"


def _write_corpus(data: Path, corpus: Path | None, say: Callable[[str], None]) -> tuple[bytes, bytes]:
    """train.jsonl and valid.jsonl; returns both texts, for the compressors."""
    from castalia.data.corpora import split_by_file, stdlib_corpus, write_documents
    from castalia.data.sources import iter_documents

    if corpus is None:
        train, valid = split_by_file(stdlib_corpus(), VALID_FRACTION)
    else:
        # Named relative to the corpus, so that the same texts are split alike wherever they lie.
        documents = [(f"{os.path.relpath(d.source, corpus)}#{d.number}", d.text) for d in iter_documents([corpus])]
        train, valid = split_by_file(documents, VALID_FRACTION)
        if len(documents) < 50 or sum(len(text) for _, text in valid) < MIN_VALID_BYTES:
            # Too few to leave some out: the end of each is unseen instead.
            cut = [(name, text, int(len(text) * (1 - VALID_FRACTION))) for name, text in documents]
            train = [(name, text[:at]) for name, text, at in cut]
            valid = [(name, text[at:]) for name, text, at in cut]
    write_documents(data / "train.jsonl", train)
    write_documents(data / "valid.jsonl", valid)
    texts = tuple("".join(text for _, text in part).encode() for part in (train, valid))
    if len(texts[0]) < 100_000 or len(texts[1]) < MIN_VALID_BYTES:
        raise UserError(
            f"{corpus}: holds {len(texts[0]) + len(texts[1]):,} bytes of text; the demo needs at least 110,000"
        )
    say(
        f"      {len(train):,} documents, {len(texts[0]) / 1e6:.2f} MB to train on; "
        f"{len(valid):,}, {len(texts[1]) / 1e6:.2f} MB unseen"
    )
    return texts[0], texts[1]


def _train_tokenizer(data: Path, say: Callable[[str], None]) -> Any:
    from castalia.data.sources import iter_documents
    from castalia.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe

    started = time.monotonic()
    save_tokenizer(
        train_bpe((d.text for d in iter_documents([data / "train.jsonl"])), VOCAB_SIZE), data / "tokenizer.json"
    )
    tokenizer = load_tokenizer(data / "tokenizer.json")
    say(f"      {tokenizer.vocab_size:,} ids in {time.monotonic() - started:.0f} s")
    return tokenizer


def _prepare(data: Path, tokenizer: Any, say: Callable[[str], None]) -> None:
    from castalia.data.prepare import prepare

    for part in ("train", "valid"):
        summary = prepare([data / f"{part}.jsonl"], data / part, tokenizer, overwrite=True)
        say(f"      {part}: {summary['tokens']:,} tokens, {summary['bytes'] / summary['tokens']:.2f} bytes per token")


def _config(data: Path, run_dir: Path, overrides: Sequence[str]) -> Config:
    source = shipped_config("demo.yml")
    paths = [
        f"data.train_paths=[{json.dumps(str(data / 'train'))}]",
        f"data.valid_paths=[{json.dumps(str(data / 'valid'))}]",
    ]
    return load([source], [*paths, f"output={json.dumps(str(run_dir))}", *overrides])


def shipped_config(name: str) -> Path:
    """A file of configs/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"configs/{name} is missing from this installation: install castalia again")


def _affordable(config: Config, vocab_size: int, seconds: float, say: Callable[[str], None]) -> tuple[str, int, float]:
    """The faster precision on this machine, how many steps of it fit into the time, and tokens per second in fp32.

    bf16 is twice as fast as fp32 on some CPUs and half as fast on others, so both are tried.
    """
    times = {p: _seconds_per_step(config, vocab_size, p, min(5.0, 0.05 * seconds)) for p in ("fp32", "bf16")}
    precision = min(times, key=lambda p: times[p])
    # Validation and checkpoints take their share too.
    steps = max(10, int(0.93 * seconds / times[precision]))
    measured = ", ".join(f"{1000 * t:.0f} ms in {p}" for p, t in times.items())
    say(f"      a step takes {measured}: {steps:,} steps in {precision}")
    return precision, steps, config.training.batch_size * config.data.seq_length / times["fp32"]


def _seconds_per_step(config: Config, vocab_size: int, precision: str, budget: float) -> float:
    """Median time of a step on random tokens."""
    import torch

    from castalia.data.loader import Batch
    from castalia.model.kernels import choose_fp32_matmul
    from castalia.model.transformer import build_model
    from castalia.optim import make_store
    from castalia.parallel.world import enter_world
    from castalia.train.engine import LocalEngine

    full, _ = derive(config, vocab_size)
    world = enter_world(full.performance.device)
    choose_fp32_matmul(world.device)
    model = build_model(full.model, 0, world.device)
    store = make_store(model, full.optimizer, precision, full.performance.arena)
    engine = LocalEngine(model, store, full.loss)
    shape = (full.micro_batch_size, full.data.seq_length + 1)
    ids = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(shape[1] - 1).expand(shape[0], -1))
    micro = full.training.batch_size // full.micro_batch_size
    times: list[float] = []
    began = time.monotonic()
    # The first steps also allocate and plan; a few seconds are enough for a rate.
    while len(times) < 5 or (time.monotonic() - began < budget and len(times) < 100):
        started = time.monotonic()
        engine.forward_backward([batch] * micro, batch.num_tokens * micro)
        store.gradient_norm().item()
        store.step(1e-4)
        times.append(time.monotonic() - started)
    return sorted(times[2:])[len(times[2:]) // 2]


def _make_room(run_dir: Path) -> None:
    """Set an earlier run of this name aside, as NAME.1, NAME.2, ...; a run that is going on is refused.

    Each demo trains for as long as the machine allows, so it never goes on from an earlier one.
    """
    if not run_dir.exists():
        return
    with RunLock(run_dir):
        aside = next(p for n in itertools.count(1) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        os.rename(run_dir, aside)


def _train(config: Config) -> Path:
    from castalia.train.run import train

    return train(config).directory


def _compare(
    run_dir: Path, data: Path, texts: tuple[bytes, bytes], rate: float, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Bits per byte of the model, and of compressors given the same training text, on the unseen files.

    On a slow or busy machine the model reads only the beginning of these, which is then what the compressors get,
    and compressors that are not done in time are left out.

    Args:
        run_dir, data: of the demo.
        texts: to train on, and unseen.
        rate: tokens per second of training. Each token is scored in one of two windows that it is read in, forward
            alone, which takes two thirds of that time.
        seconds: that the model may take, and the compressors after it.
        say: takes each line for people.
    """
    from castalia.data.store import TokenStore
    from castalia.evaluate.perplexity import score_store
    from castalia.generate.load import load_run
    from castalia.tools.compression import compression_bits_per_byte

    model, tokenizer = load_run(run_dir)
    seq_length = load([run_dir / "config.yaml"]).data.seq_length
    store, most = TokenStore(data / "valid"), max(int(rate * seconds), seq_length)
    train_text, valid_text = texts
    progress = _every_ten_seconds(say)
    score = score_store(model, tokenizer, store, seq_length, max_tokens=most, progress=progress)
    assert score.bytes is not None, "the demo's tokenizer keeps every byte"
    unseen = valid_text[: score.bytes]
    if len(unseen) < len(valid_text):
        say(f"      the first {len(unseen) / 1e6:.2f} MB of them: this machine reads no more in {seconds:.0f} s")
    comparison = compression_bits_per_byte(train_text, unseen, seconds, lambda line: say(f"      {line}"))
    note = "trained on the training text"
    row = {"name": "castalia", "bits_per_byte": score.bits_per_byte, "note": note, "model": True}
    comparison["rows"].insert(0, row)
    return comparison


def _every_ten_seconds(say: Callable[[str], None]) -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"      the model has read {done:,} of {of:,} tokens")

    return progress


def _sample(run_dir: Path, prompt: str, length: int) -> str:
    from castalia.generate import generate
    from castalia.generate.load import load_run

    model, tokenizer = load_run(run_dir)
    return generate(model, tokenizer, [prompt], max_tokens=length, temperature=0.7, top_p=0.95, seed=1)[0].text


def demo_minutes(default: float) -> float:
    """CASTALIA_DEMO_SECONDS shortens the demo, for tests."""
    text = os.environ.get("CASTALIA_DEMO_SECONDS")
    if text is None:
        return default
    try:
        return float(text) / 60
    except ValueError:
        raise UserError(f"CASTALIA_DEMO_SECONDS is '{text}': it must be a number of seconds") from None


def print_lines(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)
