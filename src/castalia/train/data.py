"""Configuration -> the tokenizer and the data sets of a run, with their fingerprints.

data.path + split ──┐                           ┌> train  PackedDataset / BlendedDataset
data.*_paths ───────┴─> TokenStore, documents ──┼> valid
                                                └> test
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from castalia.config import Config
from castalia.config.curriculum import sequence_length
from castalia.config.ramp import planned, run_samples
from castalia.data.blend import blend_requests, weights_by_num_documents
from castalia.data.blend_tree import ComputedBlend
from castalia.data.exclusions import excluded_documents
from castalia.data.fim import FillInMiddle, sentinel_ids
from castalia.data.order import split_documents
from castalia.data.plan import Amendment, RunPlan, evaluation_samples
from castalia.data.sample import BlendedDataset, PackedDataset, SampleSource
from castalia.data.store import TokenStore, data_fingerprint
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass
class RunData:
    """What a run reads.

    Attributes:
        datasets: by split; a split without data is absent.
        fingerprints: of every data set read, by its prefix, in the order of the configuration.
        train_fingerprints: of the training sets alone, in order: what a resumed run must find again.
        epochs: how many epochs (of whole documents: samples) each training set is laid out for; with
            GPT-NeoX's order, another number shuffles everything anew.
        train_prefixes: of the training sets, in order, each once.
        excluded: documents of theirs that are not learnt, in the journal's form.
        token_bytes: int32 [vocab], UTF-8 bytes behind each id, or None without a tokenizer that keeps every byte.
    """

    datasets: dict[str, SampleSource]
    fingerprints: dict[str, str]
    train_fingerprints: list[str]
    epochs: list[int]
    train_prefixes: list[str]
    excluded: tuple[tuple[str, ...], ...]
    tokenizer: Tokenizer | None
    token_bytes: np.ndarray | None


def open_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that the configuration names, or the one kept beside the data; None if neither is there.

    Raises:
        UserError: it cannot be read, or it is not the one the data was made with.
    """
    prefixes = _prefixes(config)
    kept = [Path(f"{prefix}.tokenizer.json") for prefix in prefixes]
    stores = [TokenStore(prefix, lazy=True) for prefix in prefixes]  # what they hold is checked by `open_data`
    infos = [(s, p) for s, p in zip((s.info for s in stores), prefixes, strict=True) if s]
    spec: str | None = config.tokenizer.path
    if spec is None:
        spec = next((str(path) for path in kept if path.exists()), None)
        if spec is None:
            named = infos[0][0]["tokenizer"] if infos else {}  # what has no file is found again by its name
            spec = str(named["type"]) if named and named.get("sha256") is None else None
    if spec is None:
        return None
    tokenizer = load_tokenizer(spec)
    mine = tokenizer.identity()
    for info, prefix in infos:
        theirs = info["tokenizer"]
        if theirs.get("sha256") != mine.get("sha256") or theirs["type"] != mine["type"]:
            raise UserError(
                f"{prefix}: was made with another tokenizer ({theirs['type']}, {theirs['vocab_size']} ids) than {spec} "
                f"({mine['type']}, {mine['vocab_size']} ids): name the right one in tokenizer.path, "
                "or prepare the data again"
            )
    return tokenizer


def open_data(config: Config, steps: int, tokenizer: Tokenizer | None) -> RunData:
    """Open the data sets for a run of `steps` steps.

    Args:
        config: the run, derived.
        steps: optimizer steps, which decide how many samples are laid out.
        tokenizer: for bits per byte, where there is one.

    Raises:
        UserError: a data set is missing, damaged, too small, or no data is named.
    """
    counts = sample_counts(config, steps)
    data = config.data
    fingerprints: dict[str, str] = {}
    datasets: dict[str, SampleSource] = {}
    if data.path is not None:
        store = _open(data.path, config, fingerprints)
        own = _open(data.label_path, config, fingerprints) if data.label_path is not None else None
        parts = split_documents(len(store), data.split)
        for split, documents in zip(SPLITS, parts, strict=True):
            if documents[1] > documents[0] and counts[split] > 0:
                datasets[split] = _packed(store, documents, counts[split], config, own)
    else:
        for split in SPLITS:
            paths = getattr(config.data, f"{split}_paths")
            if paths and counts[split] > 0:
                stores = [_open(path, config, fingerprints) for path in paths]
                labels = getattr(config.data, f"{split}_label_paths")
                label_stores: list[TokenStore | None] = [None] * len(paths)
                if labels:
                    label_stores = [_open(path, config, fingerprints) for path in labels]
                weights = getattr(config.data, f"{split}_weights") or [1.0] * len(paths)
                if data.weights_alpha is not None:
                    documents_ = [len(store) for store in stores]
                    weights = weights_by_num_documents(documents_, data.weights_alpha, data.weights_formula)
                wanted = _wanted(weights, counts[split], data.order)
                parts_ = [
                    _packed(store, (0, len(store)), number, config, own)
                    for store, number, own in zip(stores, wanted, label_stores, strict=True)
                ]
                datasets[split] = (
                    BlendedDataset(parts_, weights, counts[split], data.order) if len(parts_) > 1 else parts_[0]
                )
    if steps > 0 and "train" not in datasets:
        raise UserError("no training data: give data.path (with data.split), or data.train_paths")
    table = tokenizer.token_bytes() if tokenizer is not None else None
    train = datasets.get("train")
    laid = train.datasets if isinstance(train, BlendedDataset) else [train] if isinstance(train, PackedDataset) else []
    mine = [data.path, data.label_path, *(data.train_paths or []), *(data.train_label_paths or [])]
    trained = [fingerprints[prefix] for prefix in mine if prefix in fingerprints]
    # A permutation's order does not depend on how many epochs there will be, GPT-NeoX's of whole documents on the
    # number of samples.
    length = "num_epochs" if data.packing == "packed" else "num_samples"
    epochs = [getattr(part.order, length) for part in laid] if data.order == "gptneox" else []
    read = {part.store.prefix: len(part.store) for part in laid}
    excluded = excluded_documents(data.exclude, read)
    if train is not None and data.fim_rate > 0:
        datasets["train"] = _fill_in_middle(train, config, tokenizer)
    return RunData(datasets, fingerprints, trained, epochs, list(read), excluded, tokenizer, table)


def run_plan(config: Config, steps: int, journal: tuple[Amendment, ...]) -> RunPlan:
    """Which samples each step of a run takes, and how much of them."""
    data = config.data
    lengths = None if data.curriculum == "none" else partial(sequence_length, data)
    return RunPlan(config.training.batch_size, data.seq_length, steps, journal, lengths, planned(config))


def check_samples(plan: RunPlan, held: int) -> None:
    """Refuse a plan that batches of changed sizes have made longer than the data order, which was laid out without.

    Raises:
        UserError: it takes more samples than are `held`.
    """
    if plan.num_samples > held:
        fits = next(steps for steps in range(plan.steps, -1, -1) if replace(plan, steps=steps).num_samples <= held)
        raise UserError(
            f"training.batch_size: with the larger batches before, the run takes {plan.num_samples:,} samples, and the "
            f"data order holds {held:,}: set training.steps to at most {fits}"
        )


def repeats(data: RunData) -> list[str]:
    """A sentence for each training set: how often its documents are read during the run."""
    train = data.datasets.get("train")
    train = train.dataset if isinstance(train, FillInMiddle) else train
    if isinstance(train, BlendedDataset):
        taken = [(part, train.blend.taken(k)) for k, part in enumerate(train.datasets)]
    else:
        taken = [(train, train.order.num_samples)] if isinstance(train, PackedDataset) else []
    lines = []
    for part, samples in taken:
        times = part.times_read(samples)
        lines.append(f"{part.store.prefix} is read {times:.3g} times: {samples:,} samples of {part.seq_length} tokens")
    return lines


def unread_sources(data: RunData) -> list[str]:
    """A sentence for each source of the training blend that the run is too short to read."""
    train = data.datasets.get("train")
    train = train.dataset if isinstance(train, FillInMiddle) else train
    if not isinstance(train, BlendedDataset):
        return []
    return [
        f"{part.store.prefix} is not read at all, as its share of the run is less than one sample: raise its weight"
        for k, part in enumerate(train.datasets)
        if train.blend.taken(k) == 0
    ]


def missing_splits(config: Config, data: RunData, steps: int) -> list[str]:
    """A sentence for each split that the configuration wants evaluated and the data does not have."""
    counts = sample_counts(config, steps)
    where = f"data.split '{config.data.split}' leaves its part of {config.data.path} empty"
    sentences = []
    for split, keys in (
        ("valid", "evaluation.interval=null evaluation.at_end=false"),
        ("test", "evaluation.test_at_end=false"),
    ):
        if counts[split] > 0 and split not in data.datasets:
            why = where if config.data.path is not None else f"data.{split}_paths is not given"
            sentences.append(f"nothing will be evaluated on the {split} split, since {why}; mend it, or set {keys}")
    return sentences


def left_out(config: Config) -> int:
    """Steps whose samples a run may come to leave out."""
    return config.guard.budget if config.guard.spikes != "none" else 0


def sample_counts(config: Config, steps: int) -> dict[str, int]:
    """Samples asked of each split, as GPT-NeoX reckons them where its order must come out the same."""
    batch, evaluation = config.training.batch_size, config.evaluation
    once = evaluation.batches * batch
    valid = once if evaluation.at_end else 0
    if evaluation.interval:
        valid = evaluation_samples(steps, evaluation.interval, evaluation.batches, batch, evaluation.continuing)
    train = run_samples(config, steps + left_out(config))
    return {"train": train, "valid": valid, "test": once if evaluation.test_at_end else 0}


def _prefixes(config: Config) -> list[str]:
    data = config.data
    if data.path is not None:
        return [data.path]
    return [p for paths in (data.train_paths, data.valid_paths, data.test_paths) for p in paths or []]


def _open(prefix: str, config: Config, fingerprints: dict[str, str]) -> TokenStore:
    store = TokenStore(prefix, lazy=config.data.order == "permutation")
    fingerprints[prefix] = data_fingerprint(store)
    vocab = config.model.vocab_size
    known = (store.info or {}).get("tokenizer", {}).get("vocab_size")
    if vocab is not None and known is not None and known > vocab:
        raise UserError(
            f"{prefix}: its tokenizer has {known} ids, more than model.vocab_size {vocab}: raise model.vocab_size"
        )
    return store


def _wanted(weights: list[float], num_samples: int, order: str) -> list[int]:
    """Samples to ask of each part of a blend: GPT-NeoX's numbers decide its order, a permutation has what is taken."""
    if order == "gptneox":
        return blend_requests(weights, num_samples)
    blend = ComputedBlend(weights, num_samples)
    return [blend.taken(k) for k in range(len(weights))]


def _fill_in_middle(train: SampleSource, config: Config, tokenizer: Tokenizer | None) -> FillInMiddle:
    data = config.data
    sentinels = sentinel_ids(data.fim_tokens, tokenizer)
    seed = config.training.seed if data.seed is None else data.seed
    eod = tokenizer.eod if tokenizer is not None else None
    return FillInMiddle(train, data.fim_rate, data.fim_spm_rate, sentinels, eod, seed)


def _packed(
    store: TokenStore, documents: tuple[int, int], samples: int, config: Config, labels: TokenStore | None = None
) -> PackedDataset:
    data = config.data
    seed = config.training.seed if data.seed is None else data.seed
    return PackedDataset(
        store, documents, samples, data.seq_length, seed, data.order, labels, data.packing, data.allow_chopped
    )
