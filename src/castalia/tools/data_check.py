"""Is a token data set what it says it is? Every doubt as one finding, with the documents it is about.

    prefix or configuration ──open, one pass──> findings: error (exit code 4) | warning | note

An error is a thing that training would get wrong: damage, ids that no tokenizer made, another
tokenizer. A warning is what a person should look at. Memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.config.ramp import run_samples
from castalia.data.blend import weights_by_num_documents
from castalia.data.order import split_documents
from castalia.data.sample import PackedDataset
from castalia.data.store import TokenStore
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.errors import UserError
from castalia.tools.data_scan import duplicates, parts

HUGE = 1_000_000  # tokens of a document that is worth a look
EPOCHS = 4.0  # repeating more often costs: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023
_EXAMPLES = 10
_TRIED, _TRIED_IDS = 20, 500  # documents, and ids of each, that are decoded and encoded again


@dataclass
class Finding:
    """One thing that was found.

    Attributes:
        level: error, warning or note.
        kind: a fixed word for programs.
        data: prefix of the data set.
        text: a sentence.
        count: documents (or ids) it is about.
        documents: the first of them.
    """

    level: str
    kind: str
    data: str
    text: str
    count: int = 1
    documents: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def check_all(
    inputs: list[str],
    overrides: list[str],
    tokenizer_path: str | None = None,
    huge: int = HUGE,
    strict: bool = False,
) -> dict[str, Any]:
    """Check data sets by prefix, or all those of a configuration and how often the run repeats them.

    Args:
        inputs: prefixes, or configuration files or a run folder.
        overrides: `key=value`, with files.
        tokenizer_path: of the tokenizer that prefixes should be made with.
        huge: as for `check_store`.
        strict: warnings count as failures.

    Returns:
        `data` (prefixes), `findings`, `forecast`, `failed`.
    """
    config = None
    folder = Path(inputs[0]) / "config.yaml" if len(inputs) == 1 else None
    if folder is not None and folder.is_file():
        config = load([folder], overrides)
    elif overrides or any(name.endswith((".yml", ".yaml", ".json")) for name in inputs):
        config = load(list(inputs), overrides)
    spec = tokenizer_path
    prefixes = inputs
    if config is not None:
        data = config.data
        paths = (data.train_paths, data.valid_paths, data.test_paths)
        prefixes = [data.path] if data.path else list(dict.fromkeys(p for some in paths for p in some or []))
        spec = spec or config.tokenizer.path
        if not prefixes:
            raise UserError("the configuration names no data: give data.path or data.train_paths")
    tokenizer = load_tokenizer(spec) if spec else None
    limit = config.model.vocab_size if config is not None else None
    findings = [f for prefix in prefixes for f in check_store(prefix, tokenizer, limit, huge)]
    rows: list[dict[str, Any]] = []
    if config is not None and not any(f.kind == "damaged" for f in findings):
        rows = forecast(derive(config, tokenizer.vocab_size if tokenizer else None)[0])
        for row in rows:
            if row["epochs"] > EPOCHS:
                text = (
                    f"is read {row['epochs']:.1f} times by the end of the run; beyond {EPOCHS:g} times repeating costs"
                )
                findings.append(Finding("warning", "repeats", row["data"], text))
    failed = any(f.level == "error" or (strict and f.level == "warning") for f in findings)
    return {"data": prefixes, "findings": [f.as_dict() for f in findings], "forecast": rows, "failed": failed}


def check_store(
    prefix: str, tokenizer: Tokenizer | None = None, vocab_size: int | None = None, huge: int = HUGE
) -> list[Finding]:
    """Check one data set from end to end.

    Args:
        prefix: of the data set.
        tokenizer: that it should have been made with; None: the one beside it, if there is one.
        vocab_size: ids must lie below it; None: the tokenizer's.
        huge: tokens from which on a document is reported.
    """
    found: list[Finding] = []

    def note(level: str, kind: str, text: str, which: _Numbers | None = None) -> None:
        count, documents = (which.count, which.first) if which is not None else (1, [])
        found.append(Finding(level, kind, prefix, text, count, documents))

    try:
        store = TokenStore(prefix)
    except UserError as error:
        note("error", "damaged", str(error))
        return found
    info = store.info or {}
    try:
        if tokenizer is None:
            tokenizer = kept_tokenizer(prefix, info)
    except UserError as error:
        note("error", "tokenizer", str(error))
    if tokenizer is not None:
        _check_tokenizer(store, info, tokenizer, note)
    known = info.get("tokenizer", {})
    limit = vocab_size or (tokenizer.vocab_size if tokenizer is not None else known.get("vocab_size"))
    eod = tokenizer.eod if tokenizer is not None else known.get("eod")
    _scan(store, info, limit, eod, huge, note)
    if (twice := duplicates(store)).size:
        share = len(twice) / len(store)
        numbers = _Numbers()
        numbers.add(twice)
        note("warning", "duplicates", f"{len(twice):,} documents ({share:.2%}) equal an earlier one", numbers)
    return found


def _scan(
    store: TokenStore,
    info: dict[str, Any],
    limit: int | None,
    eod: int | None,
    huge: int,
    note: Callable[..., None],
) -> None:
    """What one pass over the ids tells."""
    digest = hashlib.sha256() if info.get("bin_sha256") else None
    empty, large, outside, unended = (_Numbers() for _ in range(4))
    greatest = least = inside = 0
    for first, sizes, ids in parts(store):
        if digest is not None:
            digest.update(ids.data)
        ends = np.cumsum(sizes)
        empty.add(first + np.flatnonzero(sizes == 0))
        large.add(first + np.flatnonzero(sizes >= huge))
        if ids.size:
            greatest, least = max(greatest, int(ids.max())), min(least, int(ids.min()))
            if int(ids.min()) < 0 or (limit is not None and int(ids.max()) >= limit):
                wrong = np.flatnonzero((ids < 0) | (ids >= (limit if limit is not None else np.inf)))
                outside.add(first + np.unique(np.searchsorted(ends, wrong, side="right")))
            if eod is not None:
                whole = np.flatnonzero(sizes)
                closed = ids[ends[whole] - 1] == eod
                unended.add(first + whole[~closed])
                inside += int(np.count_nonzero(ids == eod)) - int(closed.sum())
    if digest is not None and digest.hexdigest() != info["bin_sha256"]:
        note("error", "changed", f"{store.bin_path} is not what was written: its SHA-256 is not that in the .json")
    for key, value in (("documents", len(store)), ("tokens", store.num_tokens)):
        if info.get(key) not in (None, value):
            note("error", "counts", f"{store.prefix}.json says {info[key]} {key}, the index {value}")
    if len(store.doc_idx) < 2 and len(store) > 0:
        note("warning", "doc_idx", "the index has no document starts; `castalia data convert` writes them")
    if outside.count:
        span = (
            f"ids from {least} to {greatest}, and the vocabulary has {limit}" if limit is not None else "negative ids"
        )
        note("error", "vocabulary", f"{outside.count:,} documents hold ids out of range ({span})", outside)
    if empty.count:
        note("warning", "empty", f"{empty.count:,} documents are empty", empty)
    if large.count:
        note("warning", "huge", f"{large.count:,} documents have {huge:,} tokens or more", large)
    ended = len(store) - empty.count - unended.count
    if eod is not None and unended.count:
        if info.get("append_eod") or ended:
            text = f"{unended.count:,} documents do not end with the end-of-document id {eod}"
            note("error" if info.get("append_eod") else "warning", "eod", text, unended)
        else:
            note("warning", "eod", f"no document ends with the end-of-document id {eod}")
    if inside:
        text = f"the end-of-document id {eod} occurs {inside:,} times inside documents"
        note("warning", "eod_inside", text)


class _Numbers:
    """How many documents, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, documents: np.ndarray) -> None:
        self.count += len(documents)
        self.first += documents[: _EXAMPLES - len(self.first)].tolist()


def kept_tokenizer(prefix: str, info: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer kept beside a data set, or that its description names; None where there is none."""
    path = Path(f"{prefix}.tokenizer.json")
    if path.is_file():
        return load_tokenizer(str(path))
    return load_tokenizer("byte") if info.get("tokenizer", {}).get("type") == "byte" else None


def _check_tokenizer(store: TokenStore, info: dict[str, Any], tokenizer: Tokenizer, note: Callable[..., None]) -> None:
    """Is it the tokenizer that made the ids? By its identity, and by what it makes of its own text."""
    mine, theirs = tokenizer.identity(), info.get("tokenizer")
    if theirs and (theirs.get("sha256"), theirs.get("type")) != (mine.get("sha256"), mine.get("type")):
        names = f"{theirs.get('type')}, {theirs.get('vocab_size')} ids; here {mine['type']}, {mine['vocab_size']} ids"
        note("error", "tokenizer", f"the data was made with another tokenizer ({names})")
        return
    tried = wrong = 0
    for document in np.unique(np.linspace(0, len(store) - 1, _TRIED).astype(np.int64)) if len(store) else ():
        ids = store.get(int(document))
        ids = ids[ids != tokenizer.eod] if tokenizer.eod is not None else ids
        ids = ids[:_TRIED_IDS]
        if not ids.size or ids.max() >= tokenizer.vocab_size or ids.min() < 0:
            continue
        again = np.array(tokenizer.encode(tokenizer.decode(ids.tolist())))
        common = min(len(ids), len(again))
        differing = np.flatnonzero(again[:common] != ids[:common])
        agrees = int(differing[0]) if differing.size else common
        tried += 1
        wrong += agrees < 0.8 * len(ids)
    if tried and wrong > tried / 2:
        text = f"of {tried} documents {wrong} are not cut as this tokenizer cuts their text: it seems to be another one"
        note("error", "tokenizer", text)


def forecast(config: Config) -> list[dict[str, Any]]:
    """How often each training source will have been read by the end of the run.

    Args:
        config: derived.

    Returns:
        For each source: `data`, `share` of the run, training `tokens` it has, `served` by the end (padding
        included), `epochs`.
    """
    data = config.data
    prefixes = [data.path] if data.path is not None else list(data.train_paths or [])
    stores = [TokenStore(prefix, lazy=True) for prefix in prefixes]
    weights = (data.train_weights if data.path is None else None) or [1.0] * len(prefixes)
    if data.weights_alpha is not None and data.path is None:
        weights = weights_by_num_documents([len(store) for store in stores], data.weights_alpha, data.weights_formula)
    labels: list[str] | list[str | None] = data.train_label_paths or [data.label_path] * len(prefixes)
    samples = run_samples(config, config.training.steps or 0)
    rows = []
    for prefix, store, weight, label in zip(prefixes, stores, weights, labels, strict=True):
        low, high = split_documents(len(store), data.split)[0] if data.path is not None else (0, len(store))
        has = int(store.sizes[low:high].sum(dtype=np.int64))
        share = weight / sum(weights)
        served, epochs = round(samples * share), float("inf")
        if has:  # by the order that is made soonest: all read a document as often
            own = TokenStore(label) if label is not None else None
            rule = (data.seq_length, 0, "permutation", own, data.packing, data.allow_chopped)
            epochs = PackedDataset(store, (low, high), 1, *rule).times_read(served)
        rows.append(
            {"data": prefix, "share": share, "tokens": has, "served": served * data.seq_length, "epochs": epochs}
        )
    return rows
