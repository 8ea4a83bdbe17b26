"""Texts: each document by itself, whatever the batch and its neighbours, with bytes of the text as given."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from castalia.data.tokenizer import ByteTokenizer
from castalia.errors import UserError
from castalia.evaluate.text import by_domain, read_texts, score_texts, summary

TEXTS = ["a short one", "äöü" * 30, "x" * 130, "b"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"text": t, "set": "ab"[i % 2]} for i, t in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def nll(model, text, length, stride):
    """By windows of the ids, as the docstring of `rolling_requests` says, without sharing or batching."""
    ids = [256, *text.encode()]
    total, done = 0.0, 0
    while done < len(ids) - 1:
        end = min(done + (stride if done else length), len(ids) - 1)
        window = ids[max(end - length, 0) : end + 1]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([window[:-1]])))[0, :, :257].double().log_softmax(-1)
        n = end - done
        total -= logits[range(len(window) - 1 - n, len(window) - 1), window[-n:]].sum().item()
        done = end
    return total


@pytest.mark.parametrize(("batch_size", "stride"), [(1, 24), (8, None), (32, 48), (8, 5)])
def test_documents_are_scored_by_themselves(subject, corpus, batch_size, stride):
    found = score_texts(subject, read_texts([corpus], domain="set"), stride, batch_size)
    assert [s.bytes for s in found] == [len(t.encode()) for t in TEXTS]
    for one, text in zip(found, TEXTS, strict=True):
        assert one.nll == pytest.approx(nll(subject.model, text, 48, stride or 24), rel=1e-5)
    domains = by_domain(found)
    assert list(domains) == ["a", "b"] and domains["a"]["documents"] == 2
    whole = summary(found)
    assert whole["nll"] == pytest.approx(sum(d["nll"] for d in domains.values()))
    assert whole["bits_per_byte"] == pytest.approx(whole["nll"] / math.log(2) / whole["bytes"])


def test_the_file_is_the_domain_where_no_field_is_named(subject, corpus, tmp_path):
    (tmp_path / "d.txt").write_text("more")
    found = score_texts(subject, read_texts([corpus, str(tmp_path / "d.txt")]))
    assert [d["documents"] for d in by_domain(found).values()] == [4, 1]


def test_a_field_that_is_not_there_says_so(subject, corpus):
    with pytest.raises(UserError, match="nothing"):
        list(read_texts([corpus], domain="nothing"))


def test_a_stride_beyond_the_length_is_refused(subject, corpus):
    with pytest.raises(UserError, match="stride 49"):
        score_texts(subject, read_texts([corpus]), 49)


class Forgetful(ByteTokenizer):
    """Loses capitals."""

    def encode_batch(self, texts):
        return super().encode_batch([t.lower() for t in texts])


def test_no_bits_per_byte_where_the_tokenizer_loses_text(subject, tmp_path):
    (tmp_path / "d.txt").write_text("Some Capitals")
    (tmp_path / "e.txt").write_text("none")
    lossy = dataclasses.replace(subject, tokenizer=Forgetful())
    found = by_domain(score_texts(lossy, read_texts([str(tmp_path)]))).values()
    assert [d["bits_per_byte"] is None for d in found] == [True, False]
