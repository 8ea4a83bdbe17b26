"""The noise scale of a run: one number in every layout that can tell it, from known gradients."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from castalia.config import Config
from castalia.config.derive import derive
from castalia.config.load import from_yaml
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model import build_model
from castalia.optim import make_store
from castalia.optim.weights import ArenaStore
from castalia.parallel.layout import Layout, layout_of
from castalia.parallel.mesh import Mesh
from castalia.parallel.testing import run_in_processes
from castalia.train.assemble import assemble
from castalia.train.engine import LocalEngine, StepStats, small_part
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics
from castalia.train.noise import NoiseMeter, check_noise, grouped
from castalia.train.run import train
from castalia.train.sinks import scalars

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


Squares = dict[str, float]


def measured(world, parallel: str) -> tuple[tuple[Squares, float], Squares, float]:
    """What an engine says of the small part, the squares of the whole gradient, and its norm."""
    config = config_of(parallel)
    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts = assemble(config, mesh)
    parts.engine.measures_noise = True
    parts.store.watch_first()
    stats = parts.engine.forward_backward(micro_batches(mesh.data_rank, mesh.layout.data), int((rows()[1] >= 0).sum()))
    assert stats.small is not None
    return stats.small, parts.store.squares(), parts.store.gradient_norm().item()


def gradient_of(numbers: list[int]) -> tuple[Squares, int]:
    """Squared norm of the mean gradient of some rows by parameter, and their valid labels, from autograd alone."""
    config = config_of()
    model = build_model(config.model, config.training.seed)
    engine = LocalEngine(model, make_store(model, config.optimizer, "fp32", False), config.loss)
    tokens, labels = rows()
    valid = int((labels[numbers] >= 0).sum())
    ids = torch.tensor(numbers)
    engine.forward_backward(
        [Batch(tokens[ids], labels[ids], torch.arange(8).repeat(len(ids), 1), sample_ids=ids)], valid
    )
    return {name: float(p.grad.double().square().sum()) for name, p in model.named_parameters()}, valid


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
    squares = {name: sum(s[name] for s, _ in expected) / len(parts) for name in expected[0][0]}
    tokens = sum(t for _, t in expected) / len(parts)
    whole, _ = gradient_of(list(range(8)))
    for small, big, norm in run_in_processes(procs, measured, parallel):
        assert small == (pytest.approx(squares, rel=1e-4), tokens)
        assert big == pytest.approx(whole, rel=1e-4)
        assert sum(small[0].values()) == pytest.approx(sum(squares.values()), rel=1e-5)
        assert norm**2 == pytest.approx(sum(whole.values()), rel=1e-5)


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
        check_noise(config_of(overrides), layout)


@pytest.mark.parametrize(
    ("batch", "words"), [(2, "a larger batch would save steps"), (20, "about right"), (500, "a smaller batch")]
)
def test_advice_follows_the_interval(batch, words):
    meter = NoiseMeter(config_of().logging)
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):  # a scale of 160 tokens, so of 20 sequences of 8
        means = torch.full((4, 50), 0.02**0.5) + torch.randn(4, 50, generator=draw) * (160 / 50 / 64) ** 0.5
        big = means.mean(0)
        small = {"a": float(means.square().sum(1).mean())}
        meter.add(StepStats(0.0, 256, 1.0, small=(small, 64.0)), float(big.norm()), 32)
    assert words in meter.advice(batch) and "about 19.7 sequences" in meter.advice(batch)


SCALES = {"embedding": 4.0, "layers.0": 12.0, "layers.1": 60.0}
"""Of each group: the trace of its gradients' covariance over the square of their mean."""
PATTERNS = ["embedding", r"layers\.\d+"]


class Known(torch.nn.Module):
    """The gradient of a sample is the sample: |G|^2 = 1 in each group, and the noise is what it is drawn with."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"embedding": (8, 4), "layers.0": (30,), "layers.1": (5, 6)}
        for name, shape in shapes.items():
            owner: torch.nn.Module = self
            for part in name.split("."):
                if part not in dict(owner.named_children()):
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.weight = torch.nn.Parameter(torch.zeros(shape))

    def samples(self, name: str, count: int, draw: torch.Generator) -> torch.Tensor:
        shape = self.get_parameter(name).shape
        deviation = (SCALES[name.removesuffix(".weight")] / shape.numel()) ** 0.5
        return shape.numel() ** -0.5 + torch.randn(count, *shape, generator=draw) * deviation


WINDOW, WINDOWS = 40, 8


def known(world, micro: int, size: int) -> list[dict[str, dict[str, float]]]:
    """What the meter says, after each window, of gradients of known noise in `micro` micro-batches on each rank."""
    from castalia.parallel.plans import Place
    from castalia.parallel.store import SpreadStore

    config = config_of()
    model, mesh = Known(), Mesh(Layout(replicate=world.size), world)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    store = ArenaStore(model, config.optimizer, None)
    if world.size > 1:
        places = {n: Place(s, (0,) * len(s), s, copies=world.size) for n, s in shapes.items()}
        store = SpreadStore(store, places, mesh, shapes, config.optimizer)
    logging = config.logging.model_copy(update={"noise_scale_groups": PATTERNS, "noise_scale_window": WINDOW})
    meter, draw, together = NoiseMeter(logging), torch.Generator().manual_seed(world.rank), micro * size * world.size
    found = []
    for step in range(WINDOWS * WINDOW):
        small = None
        for number in range(micro):
            loss = sum((p * model.samples(n, size, draw)).sum() / together for n, p in model.named_parameters())
            loss.backward()
            store.collect()
            if number == 0:
                small = small_part(store, mesh, size, together / size)
        store.reduce()
        meter.before_update(store)
        meter.add(StepStats(0.0, together, 1.0, small=small), store.gradient_norm().item(), together)
        store.discard()
        if step % WINDOW == WINDOW - 1:
            found.append(meter.by_group())
    return found


@pytest.mark.parametrize(("procs", "micro", "size"), [(1, 2, 8), (1, 4, 8), (2, 2, 4)])
def test_each_group_s_noise_is_within_its_interval(procs, micro, size):
    first, *others = run_in_processes(procs, known, micro, size)
    assert all(found == first for found in others)
    hits = 0
    for group, truth in SCALES.items():
        values = [window[group] for window in first]
        hits += sum(v["low"] <= truth <= (v["high"] or truth) for v in values)
        assert median(v["value"] for v in values) == pytest.approx(truth, rel=0.25), group
    assert hits >= 0.8 * len(SCALES) * WINDOWS  # 95%, and three standard deviations of that count below


def test_groups_follow_the_text_that_the_first_pattern_finds():
    squares = {
        "embedding.weight": 1.0,
        "layers.1.mlp.up.weight": 2.0,
        "layers.10.mlp.up.weight": 3.0,
        "head.weight": 4.0,
    }
    assert grouped(squares, [r"layers\.\d+", "weight"]) == {"weight": 5.0, "layers.1": 2.0, "layers.10": 3.0}
    assert grouped(squares, ["mlp"]) == {"mlp": 5.0}


@pytest.mark.parametrize(("pattern", "message"), [("attn", "matches none"), ("(", "no regular expression")])
def test_groups_without_parameters_are_refused(pattern, message):
    config = config_of()
    logging = config.logging.model_copy(update={"noise_scale_groups": [pattern]})
    with pytest.raises(UserError, match=message):
        check_noise(config.model_copy(update={"logging": logging}), Layout())


def test_a_run_records_groups_and_keeps_them_over_sittings(tiny_values):
    values = tiny_values | {
        "logging": {"interval": 1, "noise_scale": True, "noise_scale_groups": ["embedding", r"layers\.\d+"]}
    }
    whole = train(Config.model_validate(values | {"output": tiny_values["output"] + "-whole"}), quiet=True)
    stop = values | {"training": values["training"] | {"exit_interval": 5}}
    with pytest.raises(Stopped):
        train(Config.model_validate(stop), quiet=True)
    halves = train(Config.model_validate(values), quiet=True)
    records = [
        [r for r in read_metrics(run.directory / "metrics.jsonl") if r["kind"] == "noise"] for run in (whole, halves)
    ]
    assert records[0] == records[1] and records[0][0]["step"] == 2
    assert sorted(records[0][-1]["groups"]) == ["embedding", "layers.0", "layers.1"]
    assert "noise_scale/layers.1" in scalars(records[0][-1])
