"""The layout that is chosen for a run: the plainest that fits and is legal."""

from __future__ import annotations

import pytest

from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.errors import UserError
from castalia.parallel.auto import choose_layout

# 1.2 GB of weights, as much of gradients, twice that of moments.
TEXT = (
    "model: {{num_layers: 24, hidden_size: 1024, num_attention_heads: {heads}, vocab_size: 1024}}\n"
    "data: {{seq_length: 64}}\ntraining: {{steps: 9, batch_size: 8, micro_batch_size: 1}}\nparallel: {{{parallel}}}\n"
)


def config_of(parallel="", heads=16):
    return derive(from_yaml(TEXT.format(parallel=parallel, heads=heads), "f.yml"), 1024)[0]


@pytest.mark.parametrize(
    ("world", "local", "gigabytes", "expected"),
    [
        (1, 1, 100, (0, 1, 1)),
        (4, 4, 100, (0, 1, 1)),
        (4, 4, 5.0, (1, 1, 1)),
        (4, 4, 3.5, (2, 1, 1)),
        (4, 4, 2.2, (3, 1, 1)),
        (8, 8, 1.0, (3, 2, 1)),
        (16, 8, 100, (0, 2, 1)),  # eight samples are not enough for sixteen replicas
        (16, 1, 100, (0, 1, 2)),  # nor does a host have several ranks
    ],
)
def test_the_plainest_that_fits(world, local, gigabytes, expected):
    chosen, (line,) = choose_layout(config_of(), world, local, int(gigabytes * 1e9))
    assert (chosen.zero, chosen.tensor, chosen.pipeline) == expected, line


def test_heads_and_given_sizes_are_kept():
    headless, _ = choose_layout(config_of(heads=1), 16, 8, 10**11)
    assert (headless.tensor, headless.pipeline) == (1, 2)
    assert choose_layout(config_of("zero: 1, tensor: 4"), 8, 8, 10**11)[0].tensor == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="no layout of 2 processes fits"):
        choose_layout(config_of(), 2, 2, 10**8)
    with pytest.raises(UserError, match=r"is legal for this run: training\.batch_size"):
        choose_layout(config_of("pipeline: 2"), 6, 1, 10**11)


def test_a_run_writes_down_what_was_chosen(tmp_path, monkeypatch):
    from castalia.cli import main
    from castalia.config import load
    from castalia.data.prepare import prepare
    from castalia.data.tokenizer import load_tokenizer

    (tmp_path / "a.txt").write_text("the cat sat on a mat " * 200)
    prepare([tmp_path / "a.txt"], tmp_path / "tokens", load_tokenizer("byte"))
    path = tmp_path / "run.yml"
    path.write_text(
        f"output: {tmp_path / 'run'}\ndata: {{path: {tmp_path / 'tokens'}, split: '1,0,0', seq_length: 16}}\n"
        "model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2}\nparallel: {layout: auto}\n"
        "training: {steps: 1, batch_size: 4, micro_batch_size: 2}\nevaluation: {interval: null, at_end: false}\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", str(path), "--procs", "2", "--no-report"]) == 0
    written = load([tmp_path / "run" / "config.yaml"]).parallel
    assert (written.layout, written.zero, written.tensor, written.pipeline) == ("given", 0, 1, 1)
