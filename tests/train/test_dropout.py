"""Training with dropout: the step does not feel how its batch is cut up, and a resumed run is bit-equal."""

from __future__ import annotations

import pytest
import torch

from castalia.config import Config, LossConfig, ModelConfig, OptimizerConfig
from castalia.data.loader import Batch
from castalia.model import build_model
from castalia.optim import make_store
from castalia.train.engine import LocalEngine
from castalia.train.loop import Stopped
from castalia.train.run import train

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CFG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64, rotary_fraction=0.5, residual="parallel"
)


def gradients(cut, seed=0, step=3, order=None, **dropout):
    model = build_model(CFG.model_copy(update=DROPOUT | dropout), 0)
    store = make_store(model, OptimizerConfig(), "fp32", arena=True)
    ids = torch.randint(0, 64, (8, 13), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(40, 48)
    rows = torch.tensor(order or range(8)).split(cut)
    batches = [Batch(ids[r, :-1], ids[r, 1:], torch.arange(12).repeat(len(r), 1), sample_ids=numbers[r]) for r in rows]
    loss = LocalEngine(model, store, LossConfig(), seed=seed).forward_backward(batches, 8 * 12, step).loss
    return loss, {n: g.clone() for n, g in store.gradients().items()}


def difference(a, b):
    return max(((a[n] - b[n]).norm() / (a[n].norm() + 1e-6)).item() for n in a)


def test_a_step_does_not_feel_its_micro_batches():
    loss, whole = gradients(8)
    for cut, order in ((4, None), (1, None), (4, [5, 2, 7, 0, 1, 3, 6, 4])):
        other, pieces = gradients(cut, order=order)
        assert other == pytest.approx(loss, rel=1e-6) and difference(whole, pieces) < 1e-4


def test_seed_and_step_and_dropout_itself_are_felt():
    loss, whole = gradients(8)
    for other in (gradients(8, seed=1), gradients(8, step=4), gradients(8, hidden_dropout=0.0, attention_dropout=0.0)):
        assert abs(other[0] - loss) > 1e-4 and difference(whole, other[1]) > 1e-2


def test_without_dropout_samples_need_no_numbers_and_with_it_they_do():
    def batch_engine(**dropout):
        model = build_model(CFG.model_copy(update=dropout), 0)
        return LocalEngine(model, make_store(model, OptimizerConfig(), "fp32", arena=True), LossConfig())

    ids = torch.zeros(2, 5, dtype=torch.int64)
    batch = Batch(ids, ids, torch.arange(5).repeat(2, 1))
    batch_engine().forward_backward([batch], 10)
    engine = batch_engine(**DROPOUT)
    with pytest.raises(ValueError, match="numbers of the samples"):
        engine.forward_backward([batch], 10)
    assert engine.evaluate([batch]).loss == engine.evaluate([batch]).loss  # evaluation drops nothing


@pytest.mark.parametrize("micro", [4, 8])
def test_resumed_equals_uninterrupted(tiny_values, tmp_path, micro):
    def values(output, **training):
        sections = {"model": DROPOUT, "training": {"micro_batch_size": micro, **training}}
        changed = {k: v | sections.get(k, {}) if isinstance(v, dict) else v for k, v in tiny_values.items()}
        return Config.model_validate(changed | {"output": str(tmp_path / output)})

    whole = train(values("whole"), quiet=True)
    second = whole.loader.batch(whole.loader.plan.at(1))
    assert torch.cat([b.sample_ids for b in second]).tolist() == list(range(8, 16))
    with pytest.raises(Stopped):
        train(values("parts", exit_interval=5), quiet=True)
    resumed = train(values("parts"), quiet=True)
    for name, tensor in whole.store.tensors().items():
        assert torch.equal(tensor, resumed.store.tensors()[name]), name
