"""`castalia data`: every sub-verb on a small data set, in words and as JSON, and what it refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castalia.cli import main
from castalia.data.exclusions import load_exclusions
from castalia.data.prepare import prepare
from castalia.data.store import StoreWriter, TokenStore
from castalia.data.tokenizer import load_tokenizer

TEXTS = ["the cat sat", "on the mat", "the cat sat", "a" * 50, "x"]


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    prefix = str(tmp_path / "tokens")
    prepare([tmp_path / "texts.jsonl"], prefix, load_tokenizer("byte"))
    return prefix


def answer(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> dict[str, Any]:
    assert main(["data", *map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def words(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> str:
    assert main(["data", *map(str, argv)]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def config(tmp_path: Path, **data: Any) -> str:
    values = {
        "data": {"split": "100,0,0", "seq_length": 16, **data},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "training": {"steps": 6, "batch_size": 4, "micro_batch_size": 2},
        "evaluation": {"interval": None, "at_end": False},
    }
    path = tmp_path / "run.yml"
    path.write_text(json.dumps(values))
    return str(path)


def test_view_shows_what_the_loader_gives(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    from castalia.data.loader import Loader, Shard
    from castalia.tools.data_view import open_data_run

    file = config(tmp_path, path=tokens)
    run = open_data_run([file])
    batch = Loader(run.dataset, run.plan, Shard(), 4).batch(run.plan.at(3))[0]
    found = answer(capsys, "view", file, "--step", 3)
    ids = [[i for piece in sample["pieces"] for i in piece["ids"]] for sample in found["samples"]]
    assert [row[:-1] for row in ids] == batch.tokens.tolist()
    assert [row[1:] for row in ids] == batch.labels.tolist()
    store = TokenStore(tokens)
    for piece in (piece for sample in found["samples"] for piece in sample["pieces"]):
        assert piece["ids"] == store.get(piece["document"], piece["offset"], piece["length"]).tolist()
        assert piece["document_length"] == len(store.get(piece["document"]))
    shown = words(capsys, "view", file, "--step", 3, "--row", 1)
    assert "step 3, row 1 (sample 13 of the run)" in shown and "of the run" in shown
    assert "steps 0 to 5" in words(capsys, "view", file, "--step", 6, code=2)
    assert "rows 0 to 3" in words(capsys, "view", file, "--step", 0, "--row", 4, code=2)
    assert "not a run folder" in words(capsys, "view", tmp_path, "--step", 0, code=2)


@pytest.mark.parametrize(
    ("blend", "packing"), [(False, "packed"), (True, "packed"), (False, "unpacked"), (True, "pack_until_overflow")]
)
def test_where_is_the_inverse_of_view(
    tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str], blend: bool, packing: str
) -> None:
    other = str(tmp_path / "other")
    prepare([tmp_path / "texts.jsonl"], other, load_tokenizer("byte"))
    paths = {"train_paths": [tokens, other], "train_weights": [1, 2]} if blend else {"path": tokens}
    file = config(tmp_path, packing=packing, **paths)
    used: dict[tuple[str, int], list[list[int]]] = {}
    for step in range(6):
        for sample in answer(capsys, "view", file, "--step", step)["samples"]:
            for piece in sample["pieces"]:
                place = [step, sample["row"], piece["offset"], piece["length"]]
                used.setdefault((piece["data"], piece["document"]), []).append(place)
    for prefix in [tokens, other] if blend else [tokens]:
        for document in range(20):
            found = answer(capsys, "where", file, "--doc", document, "--data", prefix)
            uses = [[use[key] for key in ("step", "row", "offset", "length")] for use in found["uses"]]
            assert uses == used.get((prefix, document), [])
    data = ["--data", tokens] if blend else []
    assert "steps use it" in words(capsys, "where", file, "--doc", 3, *data)
    assert "documents 0 to 19" in words(capsys, "where", file, "--doc", 20, *data, code=2)
    assert "not among" in words(capsys, "where", file, "--doc", 0, "--data", "elsewhere", code=2)
    if blend:
        assert "--data PREFIX" in words(capsys, "where", file, "--doc", 0, code=2)


def test_steps_that_a_journal_leaves_out() -> None:
    from castalia.data.plan import RunPlan, Skip
    from castalia.tools.data_view import step_of

    plan = RunPlan(4, 16, 6, (Skip(2, 3),))
    expected = {
        i: spec.step for spec in map(plan.at, range(6)) for i in range(spec.first_sample, spec.first_sample + 4)
    }
    found = {i: spec.step for i in range(60) if (spec := step_of(plan, i)) is not None}
    assert found == expected


def test_check_good_and_bad(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "check", tokens)
    assert [(f["level"], f["kind"], f["count"]) for f in found["findings"]] == [("warning", "duplicates", 16)]
    assert found["findings"][0]["documents"] == [2, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert answer(capsys, "check", tokens, "--strict", code=4)["failed"]
    assert "good" in words(capsys, "check", tokens)
    found = answer(capsys, "check", config(tmp_path, path=tokens))
    (row,) = found["forecast"]
    assert row["served"] == 6 * 4 * 16 and row["epochs"] == pytest.approx(row["served"] / row["tokens"])
    (row,) = answer(capsys, "check", config(tmp_path, path=tokens), "data.packing=unpacked")["forecast"]
    assert row["epochs"] == pytest.approx(6 * 4 / 20)
    found = answer(capsys, "check", config(tmp_path, path=tokens), "training.steps=100")
    assert found["findings"][-1]["kind"] == "repeats"


def bad(tmp_path: Path, documents: list[list[int]], dtype: str = "i4", info: dict[str, Any] | None = None) -> str:
    with StoreWriter(tmp_path / "bad", dtype) as writer:
        writer.add_documents(documents)
        writer.finish(info)
    return str(tmp_path / "bad")


def kinds(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 4) -> dict[str, tuple[str, list[int]]]:
    return {f["kind"]: (f["level"], f["documents"]) for f in answer(capsys, "check", *argv, code=code)["findings"]}


def test_check_names_every_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte = load_tokenizer("byte").identity()
    eod = byte["eod"]
    info = {"version": 1, "tokenizer": byte, "append_eod": True, "documents": 9}
    documents = [[65, eod], [], [65, 999, eod], [65], [66, eod, 66, eod], [1, 2, 3, 4, eod], [-1, eod]]
    found = kinds(capsys, bad(tmp_path, documents, info=info), "--huge", 5)
    assert found["vocabulary"] == ("error", [2, 6])
    assert found["empty"] == ("warning", [1])
    assert found["eod"] == ("error", [3])
    assert found["huge"] == ("warning", [5])
    assert found["counts"] == ("error", [])
    assert "eod_inside" in found
    prefix = bad(tmp_path, [[65, eod]] * 3, info={**info, "documents": 3})
    content = bytearray((tmp_path / "bad.bin").read_bytes())
    content[0] += 1
    (tmp_path / "bad.bin").write_bytes(content)
    assert kinds(capsys, prefix)["changed"] == ("error", [])
    (tmp_path / "bad.bin").write_bytes(content[:-1])
    assert list(kinds(capsys, prefix)) == ["damaged"]
    assert list(kinds(capsys, tmp_path / "none")) == ["damaged"]


def test_check_sees_another_tokenizer(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    from castalia.data.tokenizer import save_tokenizer, train_bpe

    path = str(tmp_path / "other.json")
    save_tokenizer(train_bpe(["the cat sat on the mat " * 50], 300), path)
    assert kinds(capsys, tokens, "--tokenizer", path)["tokenizer"][0] == "error"
    Path(f"{tokens}.json").unlink()  # without a description the ids themselves must tell
    assert kinds(capsys, tokens, "--tokenizer", path)["tokenizer"][0] == "error"
    assert "tokenizer" not in kinds(capsys, tokens, "--tokenizer", "byte", code=0)


def test_duplicates_in_shares_and_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castalia.tools import data_scan

    random = np.random.default_rng(0)
    documents = [random.integers(0, 2, random.integers(0, 8)).tolist() for _ in range(300)]
    store = TokenStore(bad(tmp_path, documents))
    expected = [i for i, ids in enumerate(documents) if ids and ids in documents[:i]]
    assert data_scan.duplicates(store).tolist() == expected
    monkeypatch.setattr(data_scan, "_SHARE", 50)
    monkeypatch.setattr(data_scan, "_PART", 5)
    assert data_scan.duplicates(store).tolist() == expected
    assert data_scan.frequencies(store).tolist() == [sum(ids.count(i) for ids in documents) for i in (0, 1)]


def test_count_and_stats(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(len(text) + 1 for text in TEXTS) * 4
    assert answer(capsys, "count", tokens, tokens)["tokens"] == 2 * total
    assert "together: 40 documents" in words(capsys, "count", tokens, tokens)
    found = answer(capsys, "stats", tokens, "--top", 1)
    assert (found["documents"], found["tokens"], found["lengths"]["greatest"]) == (20, total, 51)
    assert found["bytes_per_token"] == pytest.approx((total - 20) / total)
    assert found["lengths"]["histogram"][0] == {"from": 2, "to": 3, "documents": 4}
    counts = {text: sum(t.count(text) for t in TEXTS) * 4 for text in "a"}
    assert found["frequent"][0]["text"] == "a" and found["frequent"][0]["count"] == counts["a"]
    assert "the most frequent" in words(capsys, "stats", tokens)
    assert "give its prefix" in words(capsys, "stats", tokens + ".bin", code=2)


def test_exclude(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "list.txt"
    answer(capsys, "exclude", tokens, "--output", path, "--docs", "1,3-4", "--reason", "because")
    found = answer(capsys, "exclude", tokens, "--output", path, "--longer-than", 50)
    assert load_exclusions(path)[tokens].tolist() == [1, 3, 4, 8, 13, 18] and found["documents"] == 6
    words(capsys, "exclude", tokens, "--output", path, "--duplicates")
    assert load_exclusions(path)[tokens].tolist() == [1, 2, 3, 4, *range(5, 20)]
    for docs in ("20", "3-1", "x", "-1"):
        assert "--docs" in words(capsys, "exclude", tokens, "--output", path, f"--docs={docs}", code=2)
    assert "nothing is chosen" in words(capsys, "exclude", tokens, "--output", path, code=2)


def old_format(prefix: Path, documents: list[list[int]]) -> None:
    """A TNTIDX data set, as fairseq and old GPT-NeoX write it."""
    sizes = np.array([len(ids) for ids in documents], "<i8")
    index = struct.pack("<8s6Q", b"TNTIDX\0\0", 1, 4, 4, len(sizes), len(sizes), len(sizes) + 1)
    index += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    index += np.concatenate([[0], np.cumsum(sizes)]).astype("<i8").tobytes() + sizes.tobytes()
    index += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(np.array([i for ids in documents for i in ids], "<i4").tobytes())


def test_convert_the_old_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [[1, 2, 3], [], [70000]]
    old_format(tmp_path / "old", documents)
    new = tmp_path / "new"
    assert answer(capsys, "convert", tmp_path / "old", "--output", new)["format"] == "TNTIDX"
    assert [TokenStore(new).get(i).tolist() for i in range(3)] == documents
    assert "does not fit uint16" in words(
        capsys, "convert", tmp_path / "old", "--output", tmp_path / "small", "--dtype", "uint16", code=2
    )
    assert "exists already" in words(capsys, "convert", tmp_path / "old", "--output", new, code=2)
    content = (tmp_path / "old.idx").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[random.integers(8, len(content))] ^= int(random.integers(1, 256))
        (tmp_path / "old.idx").write_bytes(damaged)
        code = main(["data", "convert", str(tmp_path / "old"), "--output", str(new), "--overwrite"])
        assert code in (0, 2)
        if code == 0:
            assert [TokenStore(new).get(i).tolist() for i in range(3)] == documents
    for length in (0, 7, 30, len(content) - 1):
        (tmp_path / "old.idx").write_bytes(content[:length])
        assert main(["data", "convert", str(tmp_path / "old"), "--output", str(new), "--overwrite"]) == 2


def test_convert_floats_dtypes_and_document_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [[0.5, -1.25], [3.0]]
    theirs = bad(tmp_path, values, "f4")
    index = bytearray((tmp_path / "bad.idx").read_bytes())
    index[17] = 7  # Megatron-LM's code for float32
    (tmp_path / "bad.idx").write_bytes(index)
    assert main(["data", "count", theirs]) == 2
    answer(capsys, "convert", theirs, "--output", tmp_path / "new", "--megatron-floats")
    store = TokenStore(tmp_path / "new")
    assert store.dtype == np.float32 and [store.get(i).tolist() for i in range(2)] == values
    prefix = bad(tmp_path, [[1, 2], [3]])
    index = (tmp_path / "bad.idx").read_bytes()
    (tmp_path / "bad.idx").write_bytes(index[:26] + (1).to_bytes(8, "little") + index[34:-16])
    assert kinds(capsys, prefix, code=0)["doc_idx"] == ("warning", [])
    answer(capsys, "convert", prefix, "--output", tmp_path / "new", "--overwrite", "--dtype", "uint16")
    store = TokenStore(tmp_path / "new")
    assert (store.dtype, store.doc_idx.tolist()) == (np.uint16, [0, 1, 2])
    assert "read and written at once" in words(capsys, "convert", prefix, "--output", prefix, "--overwrite", code=2)
    assert "is not known" in words(capsys, "convert", prefix, "--output", tmp_path / "x", "--dtype", "u3", code=2)


def test_merge(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "merge", tokens, tokens, "--output", tmp_path / "both")
    assert found["documents"] == 40
    both, one = TokenStore(tmp_path / "both"), TokenStore(tokens)
    assert [both.get(i).tolist() for i in range(40)] == [one.get(i % 20).tolist() for i in range(40)]
