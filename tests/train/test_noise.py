"""The noise scale of a run: one number in every layout that can tell it, from known gradients."""

from __future__ import annotations

import pytest
import torch

from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model import build_model
from castalia.optim import make_store
from castalia.parallel.layout import Layout, layout_of
from castalia.parallel.mesh import Mesh
from castalia.parallel.testing import run_in_processes
from castalia.train.assemble import assemble
from castalia.train.engine import LocalEngine, StepStats
from castalia.train.noise import NoiseMeter

TEXT = (
    "model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, vocab_size: 32, max_position_embeddings: 8}}\n"
    "data: {{seq_length: 8}}\ntraining: {{steps: 9, batch_size: 8, micro_batch_size: 2}}\n"
    "logging: {{noise_scale: true}}\nparallel: {{{}}}\n"
)


def config_of(parallel: str = ""):
    return derive(from_yaml(TEXT.format(parallel), "f.yml"), 32)[0]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (8, 9), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100  # micro-batches with unlike numbers of valid labels
    return ids[:, :-1], labels


def micro_batches(rank: int, data: int) -> list[Batch]:
    tokens, labels = rows()
    parts = torch.arange(8).view(-1, data, 2)[:, rank]
    positions = torch.arange(8).repeat(2, 1)
    return [Batch(tokens[i], labels[i], positions, sample_ids=i) for i in parts]


def measured(world, parallel: str) -> tuple[tuple[float, float], float]:
    """What an engine says of the small part, and the norm of the whole gradient."""
    config = config_of(parallel)
    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    parts.engine.measures_noise = True
    parts.store.watch_first()
    stats = parts.engine.forward_backward(micro_batches(mesh.data_rank, mesh.layout.data), int((rows()[1] >= 0).sum()))
    assert stats.small is not None
    return stats.small, parts.store.gradient_norm().item()


def gradient_of(numbers: list[int]) -> tuple[float, int]:
    """Squared norm of the mean gradient of some rows, and their valid labels, from autograd alone."""
    config = config_of()
    model = build_model(config.model, config.training.seed)
    engine = LocalEngine(model, make_store(model, config.optimizer, "fp32", False), config.loss)
    tokens, labels = rows()
    valid = int((labels[numbers] >= 0).sum())
    ids = torch.tensor(numbers)
    engine.forward_backward(
        [Batch(tokens[ids], labels[ids], torch.arange(8).repeat(len(ids), 1), sample_ids=ids)], valid
    )
    return sum(float(p.grad.double().square().sum()) for p in model.parameters()), valid


@pytest.mark.parametrize(
    ("procs", "parallel", "parts"),
    [
        (1, "", [[0, 1]]),
        (2, "", [[0, 1], [2, 3]]),
        (2, "zero: 1", [[0, 1, 2, 3]]),
        (2, "zero: 2", [[0, 1, 2, 3]]),
        (2, "zero: 3", [[0, 1, 2, 3]]),
        (2, "tensor: 2, sequence: true", [[0, 1]]),
        (4, "pipeline: 2", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_the_small_part_is_what_autograd_says(procs, parallel, parts):
    expected = [gradient_of(rows) for rows in parts]
    square = sum(s for s, _ in expected) / len(parts)
    tokens = sum(t for _, t in expected) / len(parts)
    whole, _ = gradient_of(list(range(8)))
    for small, norm in run_in_processes(procs, measured, parallel):
        assert small == (pytest.approx(square, rel=1e-5), tokens)
        assert norm**2 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        ("", Layout(context=2), "own sequences"),
        ("", Layout(pipeline=2, shard=2, zero=1), "ZeRO in a pipeline"),
        ("", Layout(shard=4, zero=2), "goes through at once"),
    ],
)
def test_layouts_that_cannot_tell_are_refused(overrides, layout, message):
    with pytest.raises(UserError, match=message):
        NoiseMeter(config_of(overrides), layout)


@pytest.mark.parametrize(
    ("batch", "words"), [(2, "a larger batch would save steps"), (20, "about right"), (500, "a smaller batch")]
)
def test_advice_follows_the_interval(batch, words):
    meter = NoiseMeter(config_of(), Layout())
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):  # a scale of 160 tokens, so of 20 sequences of 8
        means = torch.full((4, 50), 0.02**0.5) + torch.randn(4, 50, generator=draw) * (160 / 50 / 64) ** 0.5
        big = means.mean(0)
        meter.add(StepStats(0.0, 256, 1.0, small=(float(means.square().sum(1).mean()), 64.0)), float(big.norm()), 32)
    assert words in meter.advice(batch) and "about 19.7 sequences" in meter.advice(batch)
