"""Data features end to end: masked documents, label data sets, and orders that outlive a change of length."""

from __future__ import annotations

import math

import numpy as np
import pytest

from castalia.config import Config
from castalia.data.store import StoreWriter, TokenStore
from castalia.errors import UserError
from castalia.train.data import open_data, open_tokenizer, repeats, unread_sources
from castalia.train.run import train


def test_documents_kept_apart_are_learnt(tiny_values):
    tiny_values["data"] |= {"document_mask": True, "order": "permutation"}
    apart = train(Config.model_validate(tiny_values), quiet=True)
    (batch, _) = apart.loader.batch(apart.loader.plan.at(0))
    assert batch.doc_ids is not None and batch.doc_ids.max() > 0
    assert (batch.positions[batch.doc_ids.diff(dim=1, prepend=batch.doc_ids[:, :1] - 1) != 0] == 0).all()
    mixed = tiny_values | {
        "output": tiny_values["output"] + "2",
        "data": tiny_values["data"] | {"document_mask": False},
    }
    together = train(Config.model_validate(mixed), quiet=True)
    assert math.isfinite(apart.last["train"]["loss"])
    assert apart.last["train"]["loss"] != together.last["train"]["loss"]


def test_only_labels_are_learnt(tiny_values, tiny_data, tmp_path):
    """With a label at every eighth id of a document, an eighth of the loss's terms is left."""
    store = TokenStore(tiny_data)
    with StoreWriter(tmp_path / "labels", "i4") as writer:
        for d in range(len(store)):
            ids = store.get(d).astype(np.int64)
            writer.add_document(np.where(np.arange(len(ids)) % 8 == 0, ids, -100))
        writer.finish()
    paths = {"train_paths": [str(tiny_data)], "train_label_paths": [str(tmp_path / "labels")]}
    tiny_values["data"] = {**paths, "seq_length": 32}
    tiny_values["evaluation"] = {"interval": None, "at_end": False}
    run = train(Config.model_validate(tiny_values), quiet=True)
    batches = run.loader.batch(run.loader.plan.at(3))
    share = sum(batch.num_tokens for batch in batches) / (8 * 32)
    assert 0.1 < share < 0.15 and math.isfinite(run.last["train"]["loss"])


def test_blend_by_documents_and_how_often_it_is_read(tiny_values, tiny_data):
    paths = [str(tiny_data)] * 2
    tiny_values["data"] = {"train_paths": paths, "weights_alpha": 0.5, "seq_length": 32, "order": "permutation"}
    config = Config.model_validate(tiny_values)
    data = open_data(config, 12, open_tokenizer(config))
    taken = 12 * 8 // 2 * 32 / TokenStore(tiny_data).num_tokens
    assert [line.split(": ")[0] for line in repeats(data)] == [f"{tiny_data} is read {taken:.3g} times"] * 2
    assert data.epochs == []  # a longer run has the same order


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_weights": [1.0], "weights_alpha": 0.3}, "not both"),
        ({"train_label_paths": ["a", "b"]}, "one data set"),
        ({"label_path": "a"}, "goes with data.path"),
        ({"allow_chopped": False}, "set data.allow_chopped to true, or another packing"),
    ],
)
def test_contradictions_are_refused(more, message):
    with pytest.raises((UserError, ValueError), match=message):
        Config.model_validate({"data": {"train_paths": ["x"], **more}})


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
def test_samples_of_whole_documents_are_learnt(tiny_values, tiny_data, packing):
    """The loss is of what documents hold, and a run goes on only if the packs stay where they were."""
    more = {"packing": packing, "document_mask": True, "label_path": str(tiny_data), "seq_length": 256}
    tiny_values["data"] |= more
    config = Config.model_validate(tiny_values)
    run = train(config, quiet=True)
    assert math.isfinite(run.last["train"]["loss"])
    spec = run.loader.plan.at(0)
    held = [sum(piece.length for piece in run.loader.dataset.pieces(i)) for i in range(spec.num_samples)]
    assert min(held) < 257 and max(held) <= 257
    assert sum(batch.num_tokens for batch in run.loader.batch(spec)) <= sum(held) - len(held)
    assert run.data.epochs == [config.training.steps * 8]
    tiny_values["training"] |= {"steps": config.training.steps + 1}
    with pytest.raises(UserError, match=r"laid out for \[\d+\] samples"):
        train(Config.model_validate(tiny_values), quiet=True)


def test_labels_of_a_data_set_that_is_split(tiny_values, tiny_data, tmp_path):
    store = TokenStore(tiny_data)
    with StoreWriter(tmp_path / "labels", "i4") as writer:
        for d in range(len(store)):
            ids = store.get(d).astype(np.int64)
            writer.add_document(np.where(np.arange(len(ids)) % 8 == 0, ids, -100))
        writer.finish()
    tiny_values["data"] |= {"label_path": str(tmp_path / "labels")}
    config = Config.model_validate(tiny_values)
    data = open_data(config, 12, open_tokenizer(config))
    for dataset in data.datasets.values():
        assert 0.05 < (dataset.labels(0) >= 0).mean() < 0.2
    assert data.train_fingerprints == [data.fingerprints[str(tiny_data)], data.fingerprints[str(tmp_path / "labels")]]


def test_a_permutation_opens_without_reading_the_index(tiny_values, monkeypatch):
    """What is linear in the number of documents is never called."""
    tiny_values["data"] |= {"order": "permutation"}
    config = Config.model_validate(tiny_values)
    for name in ("check", "_check_arrays", "_check_digest", "_parts"):
        monkeypatch.setattr(TokenStore, name, lambda *a: pytest.fail("the whole index was read"))
    monkeypatch.setattr(TokenStore, "fingerprint", property(lambda store: pytest.fail("the whole index was hashed")))
    tokenizer = open_tokenizer(config)
    data = open_data(config, 12, tokenizer)
    assert tokenizer is not None and len(data.datasets["train"]) >= 12 * 8 and len(data.train_fingerprints) == 1
    assert len(repeats(data)) == 1 and data.datasets["train"][5].shape == (33,)


def test_a_source_that_is_never_read_is_named(tiny_values, tiny_data):
    paths = [str(tiny_data)] * 2
    tiny_values["data"] = {"train_paths": paths, "train_weights": [1, 1e-6], "seq_length": 32, "order": "permutation"}
    config = Config.model_validate(tiny_values)
    data = open_data(config, 12, open_tokenizer(config))
    (line,) = unread_sources(data)
    assert "not read at all" in line and len(data.datasets["train"]) == 12 * 8
    tiny_values["data"]["train_weights"] = [1, 0.1]
    config = Config.model_validate(tiny_values)
    assert unread_sources(open_data(config, 12, open_tokenizer(config))) == []
