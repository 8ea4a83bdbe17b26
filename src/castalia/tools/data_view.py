"""What a step of a run saw, and which steps see a document: two inverse questions to the data order.

    step N ──plan──> sample numbers ──order──> pieces of documents ──store, tokenizer──> text     `view`
    document ──order, inverted──> sample numbers ──plan, inverted──> steps and rows               `where`

Both are computed from the configuration and the journal alone: nothing else was recorded, and a run
that has not begun is as easy to ask as one that is done. Steps that are still to come are those of
a run that goes on with the configuration as it is now.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.checkpoint import find_checkpoint
from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.data.exclusions import Exclusions, with_exclusions
from castalia.data.plan import RunPlan, StepSpec, journal_from_json
from castalia.data.sample import SampleSource, SourcePiece
from castalia.data.store import TokenStore
from castalia.data.tokenizer import Tokenizer
from castalia.errors import UserError
from castalia.train.data import open_data, open_tokenizer, run_plan


@dataclass
class DataRun:
    """The data side of a run.

    Attributes:
        config: derived.
        plan: which samples each step takes.
        dataset: the training samples.
        stores: the training data sets, by prefix, opened lazily.
        exclusions: documents that are not learnt, by step.
        tokenizer: for showing text; None where none is known.
        done: optimizer steps that the newest checkpoint has behind it; None: no checkpoint.
    """

    config: Config
    plan: RunPlan
    dataset: SampleSource
    stores: dict[str, TokenStore]
    exclusions: Exclusions
    tokenizer: Tokenizer | None
    done: int | None

    @property
    def prefixes(self) -> list[str]:
        """The training data sets, as the configuration names them."""
        return list(self.stores)


def open_data_run(files: Sequence[str], overrides: Sequence[str] = ()) -> DataRun:
    """The data side of a run folder, or of configuration files.

    Raises:
        UserError: there is no such run or configuration, or its data cannot be opened.
    """
    folder = Path(files[0]) if len(files) == 1 and Path(files[0]).is_dir() else None
    if folder is not None and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; give one that `castalia train` wrote")
    config = load([folder / "config.yaml"] if folder is not None else list(files), overrides)
    tokenizer = open_tokenizer(config)
    config, _ = derive(config, tokenizer.vocab_size if tokenizer is not None else None)
    found = find_checkpoint(folder / "checkpoints", None) if folder is not None else None
    steps = config.training.steps or 0
    journal = journal_from_json(found.state["journal"]) if found is not None else ()
    data = open_data(config, steps, tokenizer)
    if "train" not in data.datasets:
        raise UserError("the configuration has no training data: give data.path, or data.train_paths")
    done = found.step if found is not None else None
    journal = with_exclusions(journal, done or 0, data.excluded)
    plan = run_plan(config, steps, journal)
    stores = {prefix: TokenStore(prefix, lazy=True) for prefix in data.train_prefixes}
    exclusions = Exclusions(journal, data.train_prefixes)
    return DataRun(config, plan, data.datasets["train"], stores, exclusions, tokenizer, done)


def places(dataset: SampleSource, i: int, length: int) -> list[SourcePiece]:
    """The first `length` ids of sample `i`, by document."""
    found = []
    for piece in dataset.pieces(i):
        if length > 0:
            found.append(piece._replace(length=min(piece.length, length)))
        length -= piece.length
    return found


def view_step(run: DataRun, step: int) -> dict[str, Any]:
    """What step `step`, counted from 0, sees: every sample with its documents, offsets, ids and text.

    A sample has one id more than the model's input: the last one is only predicted.

    Raises:
        UserError: the run has no such step.
    """
    if not 0 <= step < run.plan.steps:
        raise UserError(f"--step {step}: the run has steps 0 to {run.plan.steps - 1}")
    spec = run.plan.at(step)
    samples = []
    for row, i in enumerate(range(spec.first_sample, spec.first_sample + spec.num_samples)):
        parts = []
        sample, at = run.dataset[i].tolist(), 0
        for place in places(run.dataset, i, spec.seq_length + 1):
            ids = sample[at : at + place.length]
            at += place.length
            part: dict[str, Any] = {
                "data": place.prefix,
                "document": place.sequence,
                "offset": place.offset,
                "length": place.length,
                "document_length": int(run.stores[place.prefix].sizes[place.sequence]),
                "excluded": run.exclusions.holds(step, place.prefix, place.sequence),
                "ids": ids,
            }
            if run.config.data.fim_rate:
                there = run.stores[place.prefix].get(place.sequence, place.offset).tolist()
                part["rearranged"] = ids != there[: place.length]
            if run.tokenizer is not None:
                part["text"] = run.tokenizer.decode(ids)
            parts.append(part)
        samples.append({"row": row, "sample": i, "pieces": parts})
    return {"step": step, "seq_length": spec.seq_length, "samples": samples}


def where_document(run: DataRun, document: int, prefix: str | None = None) -> dict[str, Any]:
    """Every step of the run that takes any token of a document, and where in the step.

    Args:
        run: the run.
        document: sequence number in its data set.
        prefix: of the data set; None where the run has only one.

    Raises:
        UserError: the data set is none of the run's, or has no such document.
    """
    if prefix is None and len(run.prefixes) != 1:
        raise UserError(f"the run reads {len(run.prefixes)} data sets: say which one with --data PREFIX")
    prefix = run.prefixes[0] if prefix is None else prefix
    if prefix not in run.prefixes:
        raise UserError(f"--data {prefix} is not among the run's training data ({', '.join(run.prefixes)})")
    number = len(run.stores[prefix])
    if not 0 <= document < number:
        raise UserError(f"--doc {document}: {prefix} has documents 0 to {number - 1}")
    uses, left_out = [], 0
    for i in run.dataset.find(prefix, document).tolist():
        spec = step_of(run.plan, i)
        if spec is None:
            left_out += i < run.plan.num_samples
            continue
        at = 0
        for place in places(run.dataset, i, spec.seq_length + 1):
            if place.sequence == document and place.prefix == prefix:
                row = i - spec.first_sample
                use = {"step": spec.step, "row": row, "sample": i, "position": at}
                excluded = run.exclusions.holds(spec.step, prefix, document)
                uses.append({**use, "offset": place.offset, "length": place.length, "excluded": excluded})
            at += place.length
    uses.sort(key=lambda use: (use["step"], use["row"], use["position"]))
    return {"data": prefix, "document": document, "done_steps": run.done, "uses": uses, "left_out_samples": left_out}


def step_of(plan: RunPlan, sample: int) -> StepSpec | None:
    """The step that takes a sample; None where none does, as it is beyond the run or left out by the journal."""
    step = bisect_right(range(plan.steps), sample, key=lambda step: plan.at(step).first_sample) - 1
    if step < 0:
        return None
    spec = plan.at(step)
    return spec if sample < spec.first_sample + spec.num_samples else None
