"""The default corpus: there on every machine, the same each time, cleanly divided."""

from __future__ import annotations

from pathlib import Path

from castalia.data.corpora import split_by_file, stdlib_corpus, write_corpus
from castalia.data.sources import iter_documents


def test_stdlib_corpus() -> None:
    corpus = stdlib_corpus()
    names = [name for name, _ in corpus]
    assert corpus == stdlib_corpus()
    assert names == sorted(set(names))
    assert len({text for _, text in corpus}) == len(corpus)
    assert {"json/decoder.py", "argparse.py", "topics/while"} <= set(names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert sum(len(text) for _, text in corpus) > 5_000_000


def test_split_is_stable_and_disjoint() -> None:
    docs = [(f"file{n}.py", str(n)) for n in range(2000)]
    train, valid = split_by_file(docs, 0.1, seed=3)
    assert sorted(train + valid) == sorted(docs)
    assert 150 < len(valid) < 250
    fewer_train, fewer_valid = split_by_file(docs[::2], 0.1, seed=3)
    assert set(fewer_train) <= set(train) and set(fewer_valid) <= set(valid)
    assert split_by_file(docs, 0.1, seed=4)[1] != valid
    assert split_by_file(docs, 0.0)[1] == []


def test_write_corpus(tmp_path: Path) -> None:
    summary = write_corpus(tmp_path / "corpus")
    assert sorted(p.name for p in (tmp_path / "corpus").iterdir()) == ["train.jsonl", "valid.jsonl"]
    train, valid = split_by_file(stdlib_corpus())
    for part, docs in (("train", train), ("valid", valid)):
        read = list(iter_documents([tmp_path / "corpus" / f"{part}.jsonl"]))
        assert [d.text for d in read] == [text for _, text in docs]
        assert summary[part] == {"documents": len(docs), "bytes": sum(d.bytes for d in read)}
