"""A corpus -> token data sets: one pass, as many workers as wanted, to be killed at any time.

    inputs ──iter_blocks──> blocks ──engine: recipe.encode──> parts ──in order──> StoreWriter of each output
                                                                └─ every second or two: sync, then the journal

The output does not depend on the number of workers, the engine or interruptions: a block's parts
depend on the block alone and are written in the order of the input.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import castalia
from castalia.data.prepare.encode import Encoder, environment
from castalia.data.prepare.engine import WorkerDied, encoded
from castalia.data.prepare.journal import Journal, Reached
from castalia.data.prepare.recipes import Output, Parts, TextRecipe
from castalia.data.prepare.shard import shard_inputs, shard_prefix
from castalia.data.sources import Block, SourceOptions, describe_inputs, iter_blocks
from castalia.data.store import StoreWriter, is_finished
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError

BLOCK_SIZE = 1 << 20  # bytes: enough to amortise a call, little to hold and to do again after a kill
SYNC_SECONDS = 1.0  # between two notes of how far it has come


@dataclass(frozen=True)
class Progress:
    """What a progress callback is given, after each block: totals so far, of the first output."""

    documents: int
    tokens: int
    bytes: int


class Interrupted(UserError):
    """Stopped by a signal; the same command goes on from there (exit code 3)."""

    exit_code = 3


class Recipe(Protocol):
    """What makes a block into parts of the outputs: `TextRecipe` or `chat.ChatRecipe`."""

    tokenizer: Tokenizer
    options: SourceOptions
    append_eod: bool

    @property
    def quick(self) -> Encoder:
        """The encoder."""

    def outputs(self) -> list[Output]:
        """The data sets that are made."""

    def describe(self) -> dict[str, Any]:
        """What the output depends on."""

    def sample(self, block: Block) -> list[str]:
        """Texts for the proof of the encoder."""

    def encode(self, block: Block) -> Parts:
        """The parts of a block."""


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str | Sequence[str] = "text",
    append_eod: bool = True,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    *,
    options: SourceOptions | None = None,
    mask_before: Sequence[int] = (),
    encoder: str = "auto",
    **how: Any,
) -> dict[str, Any]:
    """Tokenise texts into PREFIX.bin, PREFIX.idx, PREFIX.json and PREFIX.tokenizer.json.

    Args:
        inputs: files, folders, URLs (see `castalia.data.sources`), in the order of the output.
        output_prefix: PREFIX.
        tokenizer: makes the ids; a copy of its file is kept beside the data.
        text_key: key of the text in .jsonl files; of several keys each has an output, PREFIX_KEY.
        append_eod: end every document with the tokenizer's end-of-document id.
        workers: None: one for each core.
        progress: called now and then with the totals so far.
        overwrite: replace a finished data set under the same prefix, and an interrupted one of other settings.
        options: how texts are found; its `text_key` is not used.
        mask_before: ids; where given, PREFIX_label is written too, with -100 up to and including them.
        encoder: "auto", or "plain" to use the tokenizer itself.
        how: `restart`, `shard`, `engine`, `say` of `run_recipe`.

    Returns:
        The content of PREFIX.json (docs/contracts.md, section 5), and `encoder` and `proved`: the encoder
        that was used and how many documents it was proved equal on. `documents` and `bytes` count what
        was stored: a document of no ids is left out.

    Raises:
        UserError: input as in `castalia.data.sources`; output that exists; a tokenizer without
            an end-of-document id; no token in all of the input.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    keys = (text_key,) if isinstance(text_key, str) else tuple(text_key)
    if len(set(keys)) != len(keys) or not keys:
        raise UserError(f"the keys of the texts, {', '.join(keys) or 'none'}, should differ: each has an output")
    recipe = TextRecipe(tokenizer, options or SourceOptions(), keys, append_eod, tuple(mask_before), encoder)
    return run_recipe(inputs, output_prefix, recipe, workers, progress, overwrite, **how)


def run_recipe(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    recipe: Recipe,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    shard: tuple[int, int] | None = None,
    engine: str = "threads",
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Make the outputs of a recipe; see `prepare`.

    Args:
        restart: forget an interrupted preparation instead of going on with it.
        shard: (i, n): of the inputs, the i-th of n parts (from 0); see `shard.shard_inputs`.
        engine: threads, processes or ray.
        say: takes remarks, such as that an interrupted preparation goes on.
    """
    prefix = _checked_prefix(output_prefix)
    workers = _checked_workers(workers)
    if recipe.append_eod and recipe.tokenizer.eod is None:
        raise UserError(
            "the tokenizer has no end-of-document token to append: use another, or turn appending off (--no-append-eod)"
        )
    described = describe_inputs([_expanded(name) for name in inputs], recipe.options)
    if shard is not None:
        described, prefix = shard_inputs(described, *shard), shard_prefix(prefix, *shard)
    names = [str(one["name"]) for one in described]
    outputs = recipe.outputs()
    prefixes = [prefix + output.suffix for output in outputs]
    journal = Journal(prefix, {"inputs": described, "block_size": BLOCK_SIZE, **recipe.describe()})
    if restart:
        journal.remove()
    if (done := _already_done(journal, prefixes)) is not None:
        return done
    for one in prefixes:
        if is_finished(one) and not overwrite and not (journal.exists() and one != prefixes[0]):
            raise UserError(f"{one}.idx exists already: choose another output, or say --overwrite")
        if not _is_ours(Path(f"{one}.json")):
            raise UserError(f"{one}.json is no data set's description and would be overwritten: choose another output")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals_raise())
        writers = [
            stack.enter_context(StoreWriter(one, output.dtype, resume=True))
            for one, output in zip(prefixes, outputs, strict=True)
        ]
        run = _Run(recipe, outputs, writers, journal, say)
        try:
            run.open(names, anew=overwrite or restart)
            run.write(names, workers, engine, progress)
            return run.finish(described)
        except (Interrupted, WorkerDied):
            run.note()
            raise
        except OSError as error:
            run.keep()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(_full(error, prefixes)) from None
            raise
        except UserError:
            run.discard()
            raise
        except BaseException:
            run.keep()
            raise


class _Run:
    """The state of one preparation: where its writers are, and what of it is safe."""

    def __init__(
        self,
        recipe: Recipe,
        outputs: list[Output],
        writers: list[StoreWriter],
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.outputs, self.writers, self.journal, self.say = recipe, outputs, writers, journal, say
        self.reached = Reached(0, [(0, 0, 0)] * len(outputs))
        self.proved = 0
        self._lasting = True  # whether what was written can be gone on with
        self._foreign = False

    def open(self, names: list[str], anew: bool) -> None:
        """Go on with what a killed run left, or begin."""
        plan, reached = self.journal.read()
        differs = self.journal.difference(plan) if plan is not None else None
        if differs is not None and not anew:
            self._foreign = True
            what = {"inputs": "inputs (or they have changed)"}.get(differs, f"settings ({differs})")
            raise UserError(
                f"{self.journal.path}: a preparation with other {what} was interrupted here: "
                "repeat its command to go on, or say --restart to begin anew"
            )
        self._lasting = "-" not in names  # standard input does not come twice
        if differs is None and reached is not None and self._lasting:
            there = [w.start_at(d, t) for w, (d, t, _) in zip(self.writers, reached.outputs, strict=True)]
            if all(there):
                self.reached = reached
                self.journal.cut()
                self.say(f"going on after {reached.outputs[0][0]:,} documents that were prepared before")
                return
            self.say("what an interrupted preparation left is incomplete: beginning anew")
        for writer in self.writers:
            writer.start_at(0, 0)
        self.journal.begin()

    def write(self, names: list[str], workers: int, engine: str, progress: Callable[[Progress], None] | None) -> None:
        """Encode and write all blocks that are left."""
        blocks = iter_blocks(names, self.recipe.options, BLOCK_SIZE, skip=self.reached.blocks)
        first = next(blocks, None)
        if first is None:
            return
        self._prove(first)
        with environment("TOKENIZERS_PARALLELISM", "false"):  # each worker is one thread
            results = encoded(itertools.chain([first], blocks), self.recipe, workers, engine)
            last_note = time.monotonic()
            with contextlib.closing(results):
                for _, parts in results:
                    self._append(parts)
                    if progress is not None:
                        progress(Progress(*self.reached.outputs[0]))
                    if time.monotonic() - last_note >= SYNC_SECONDS:
                        self.note()
                        last_note = time.monotonic()

    def _prove(self, block: Block) -> None:
        """Hold the fast encoder against the plain one, on documents of this corpus."""
        quick = self.recipe.quick
        if quick.fast is None:
            return
        count, wrong = quick.prove(self.recipe.sample(block))
        self.proved += count
        if wrong is not None:
            self.say(f"{quick.name} gives other ids than tokenizers for this corpus: tokenizers does the work, slower")
            quick.plain()
            if hasattr(self.recipe, "encoder"):
                self.recipe.encoder = "plain"  # for workers in other processes

    def _append(self, parts: Parts) -> None:
        totals = []
        for writer, part, (_, _, size) in zip(self.writers, parts.parts, self.reached.outputs, strict=True):
            writer.add_encoded(part.ids, part.sizes)
            totals.append((writer.num_documents, writer.num_tokens, size + part.bytes))
        self.proved += parts.proved
        self.reached = Reached(self.reached.blocks + 1, totals)

    def note(self) -> None:
        """Bring everything to the disk and note it, so that a later run goes on from here."""
        if not self._lasting:
            return
        for writer in self.writers:
            writer.keep = True
        with contextlib.suppress(ValueError):  # in the midst of finishing: the last note stands
            for writer in self.writers:
                writer.sync()
            self.journal.add(self.reached)

    def keep(self) -> None:
        """Leave what the journal has noted."""
        for writer in self.writers:
            writer.keep = self._lasting

    def discard(self) -> None:
        """Leave nothing: the inputs or settings must change, and then all is done anew."""
        for writer in self.writers:
            writer.keep = self._foreign
        if not self._foreign:
            self.journal.remove()

    def finish(self, described: list[dict[str, Any]]) -> dict[str, Any]:
        """Put the data sets in place, the first one last."""
        if self.writers[0].num_tokens == 0:
            names = ", ".join(str(each["name"]) for each in described[:3]) + (", ..." if len(described) > 3 else "")
            raise UserError(f"there is no text at all in {names}: give files with text")
        self.note()
        content = self.recipe.tokenizer.file_bytes()
        summary: dict[str, Any] = {}
        order = list(zip(self.outputs, self.writers, self.reached.outputs, strict=True))
        for output, writer, (_, _, size) in reversed(order):
            info = {
                "version": 1,
                "tokenizer": self.recipe.tokenizer.identity(),
                "documents": writer.num_documents,
                "tokens": writer.num_tokens,
                "bytes": size,
                "append_eod": self.recipe.append_eod,
                "sources": [{"name": os.path.basename(str(d["name"])), "size": d["bytes"]} for d in described],
                "castalia": castalia.__version__,
            }
            if not output.is_ids:
                info["holds"] = output.suffix.rsplit("_", 1)[-1]
                if info["holds"] == "reward":
                    del info["tokenizer"]  # these are no ids of it
            kept = content if output.is_ids else None
            fingerprint = writer.finish(info, {".tokenizer.json": kept} if kept is not None else None)
            if kept is None:  # a copy that an overwritten data set had is not this one's
                Path(f"{writer.prefix}.tokenizer.json").unlink(missing_ok=True)
            summary = {**info, "sha256": fingerprint, "bin_sha256": writer.bin_sha256}
        self.journal.remove()
        return {**summary, "encoder": self.recipe.quick.name, "proved": self.proved}


def _checked_prefix(given: str | os.PathLike[str]) -> str:
    prefix = os.path.expanduser(os.fspath(given))
    if not os.path.basename(prefix):
        example = os.path.join(prefix or "data", "tokens")
        raise UserError(f"the output '{prefix}' names no files: give a prefix such as {example}")
    return prefix


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= workers <= 4096:
        raise UserError(f"--workers {workers}: give a number from 1 to 4096, or leave it out for one to each core")
    return workers


def _expanded(name: str | os.PathLike[str]) -> str:
    return os.path.expanduser(os.fspath(name))


def _already_done(journal: Journal, prefixes: list[str]) -> dict[str, Any] | None:
    """The summary, where a run was killed when all was in place but its journal."""
    plan, _ = journal.read()
    if plan is None or journal.difference(plan) is not None:
        return None
    if not all(is_finished(prefix) for prefix in prefixes):
        return None
    if any(Path(f"{prefix}.bin.partial").exists() for prefix in prefixes):
        return None
    summary: dict[str, Any] = json.loads(Path(f"{prefixes[0]}.json").read_bytes())
    for prefix in prefixes:
        Path(f"{prefix}.sizes.partial").unlink(missing_ok=True)
    journal.remove()
    return {**summary, "encoder": None, "proved": 0}


def _is_ours(path: Path) -> bool:
    """Whether a file under the name of a data set's description is one, or is not there at all."""
    if not path.exists():
        return True
    try:
        return "documents" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return False


def _full(error: OSError, prefixes: list[str]) -> str:
    files = [Path(f"{prefix}.bin.partial") for prefix in prefixes]
    sizes = ", ".join(f"{f} ({f.stat().st_size / 1e6:,.0f} MB)" for f in files if f.exists())
    return (
        f"{error.strerror or 'the disk is full'}: {sizes or prefixes[0]} and the journal beside it are kept; "
        "make room and run the same command again, or remove them"
    )


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, so that it is noted how far it came; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: the same command goes on from here")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
