"""Norms by parameter are those of the tensors; asked for or not, the run is the same."""

from __future__ import annotations

import pytest
import torch

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.data.loader import Batch
from castalia.parallel.layout import layout_of
from castalia.parallel.mesh import Mesh
from castalia.parallel.parallelize import check_model
from castalia.parallel.testing import run_in_processes
from castalia.train.assemble import assemble
from castalia.train.metrics import read_metrics
from castalia.train.norms import Norms
from castalia.train.run import Run, train


def with_logging(values, **settings):
    return Config.model_validate(values | {"logging": {"interval": 1, **settings}})


def norms_of(run):
    return [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "norms"]


@pytest.mark.parametrize("arena", [True, False])
def test_norms_are_those_of_the_tensors(arena, tiny_values):
    values = tiny_values | {"performance": {**tiny_values["performance"], "arena": arena}}
    cfg = with_logging(values, norms=["gradient", "parameter", "optimizer"], zero_gradients=True)
    with Run(cfg, quiet=True) as run:
        run.train()
        tensors = run.store.tensors()
    records = norms_of(run)
    train_records = [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 13))
    last = records[-1]
    names = {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    assert last["gradient"].keys() == last["parameter"].keys() == last["zero_gradients"].keys() == names
    assert last["optimizer"].keys() == {f"{n}_{m}" for n in names for m in ("exp_avg", "exp_avg_sq")}
    for name in names:
        assert last["parameter"][name] == pytest.approx(tensors[f"model.{name}"].norm().item(), rel=1e-5)
        moment = tensors[f"optimizer.{name}.exp_avg_sq"]
        assert last["optimizer"][f"{name}_exp_avg_sq"] == pytest.approx(moment.norm().item(), rel=1e-5)
    for norms, record in zip(records, train_records, strict=True):
        whole = torch.tensor(list(norms["gradient"].values())).norm().item()
        assert whole == pytest.approx(record["grad_norm"], rel=1e-5)
    # Ids that the batch does not have get no gradient; the bytes of the text are a handful of 384 ids.
    assert 0.9 < last["zero_gradients"]["embedding.weight"] < 1.0
    assert last["zero_gradients"]["layers.0.mlp.up.weight"] < 0.01


def test_looking_changes_nothing(tiny_values, tmp_path):
    plain = train(Config.model_validate(tiny_values), quiet=True).store.tensors()
    values = tiny_values | {"output": str(tmp_path / "other")}
    cfg = with_logging(values, norms=["gradient", "parameter", "optimizer"], zero_gradients=True)
    watched = train(cfg, quiet=True).store.tensors()
    assert all(torch.equal(plain[n], t) for n, t in watched.items())


def test_only_what_is_asked_for(tiny_values):
    run = train(Config.model_validate(tiny_values | {"logging": {"interval": 5, "norms": ["parameter"]}}), quiet=True)
    records = norms_of(run)
    assert [r["step"] for r in records] == [5, 10, 12]
    assert all(r.keys() == {"v", "kind", "step", "parameter"} for r in records)


def test_off_measures_nothing(tiny_values, monkeypatch):
    monkeypatch.setattr("castalia.train.norms.sum_of_squares", lambda tensor: 1 / 0)
    assert norms_of(train(Config.model_validate(tiny_values), quiet=True)) == []


TEXT = (
    "model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, vocab_size: 32, max_position_embeddings: 8}}\n"
    "data: {{seq_length: 8}}\ntraining: {{steps: 9, batch_size: 8, micro_batch_size: 2}}\n"
    "logging: {{norms: [gradient, parameter, optimizer], zero_gradients: true}}\n"
    "optimizer: {{type: {}}}\nparallel: {{{}}}\n"
)


def measured(world, optimizer, parallel):
    """What one update of known samples gives."""
    config = derive(from_yaml(TEXT.format(optimizer, parallel), "f.yml"), 32)[0]
    mesh = Mesh(layout_of(config.parallel, world.size), world)
    check_model(config, mesh.layout)
    parts, norms = assemble(config, mesh), Norms(config.logging)
    ids = torch.randint(0, 16, (8, 9), generator=torch.Generator().manual_seed(0))  # half the vocabulary
    rows = torch.arange(8).view(-1, mesh.layout.data, 2)[:, mesh.data_rank]
    places = torch.arange(8).repeat(2, 1)
    parts.engine.forward_backward([Batch(ids[i, :-1], ids[i, 1:], places, sample_ids=i) for i in rows], 64)
    norms.before_update(parts.store)
    parts.store.step(1e-3)
    return norms.after_update(parts.store)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("parallel", ["", "zero: 3", "tensor: 2", "pipeline: 2"])
def test_every_layout_measures_the_whole(parallel, optimizer):
    (alone,) = run_in_processes(1, measured, optimizer, "")
    assert alone["zero_gradients"]["embedding.weight"] >= 0.5
    for numbers in run_in_processes(2, measured, optimizer, parallel):
        assert numbers.keys() == alone.keys()
        for kind, values in alone.items():
            assert numbers[kind] == pytest.approx(values, rel=1e-4, abs=1e-7), kind
