"""Each optimizer against its paper's recurrence, written out in numpy; sharded against whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from castalia.config import OptimizerConfig
from castalia.errors import UserError
from castalia.model.optimizer_size import state_bytes as planned
from castalia.optim.eight_bit import SMALL, codebook, pack, unpack
from castalia.optim.matrix import orthogonal
from castalia.optim.optimizers import OPTIMIZERS, by_rule, optimizer_kind, prepare_state

A = np.ndarray
RATES = [0.01, 0.02, 0.03, 0.025, 0.02, 0.01, 0.005]
DECAY = 0.1


def gradient(p: A) -> A:
    """Of a badly conditioned quartic, so that no two elements behave alike."""
    scale = np.linspace(0.3, 3.0, p.size).reshape(p.shape)
    return scale * p + 0.5 * p**3 + 0.1 * np.roll(p, 1).reshape(p.shape)


def start(shape: tuple[int, ...]) -> A:
    return np.random.default_rng(0).normal(size=shape)


def ours(shape: tuple[int, ...], matrix: bool = True, **settings: Any) -> list[A]:
    """The weights after each update of the library's optimizer, in fp64."""
    cfg = OptimizerConfig(**settings)
    kind = optimizer_kind(cfg)
    p = torch.nn.Parameter(torch.from_numpy(start(shape).copy()))
    optimizer = kind.make([{"params": [p], "weight_decay": DECAY, "matrix": matrix}], cfg)
    prepare_state(optimizer, kind)
    path = []
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.from_numpy(gradient(p.detach().numpy()))
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return path


def adam(p: A, decoupled: bool, b1: float = 0.9, b2: float = 0.95) -> list[A]:
    m, v, path = np.zeros_like(p), np.zeros_like(p), []
    for t, lr in enumerate(RATES, 1):
        g = gradient(p) + (0 if decoupled else DECAY * p)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p * (1 - lr * DECAY * decoupled) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        path.append(p)
    return path


def onebit_adam(p: A) -> list[A]:
    """Alone: nothing is exchanged, the variance is kept after three updates; see test_one_bit.py for several."""
    b1, b2, m, v, path = 0.9, 0.95, np.zeros_like(p), np.zeros_like(p), []
    most = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    for t, lr in enumerate(RATES, 1):
        g = gradient(p)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2 if t <= 3 else v
        p = p - lr * (np.clip(m / (np.sqrt(v) + 1e-8), -most, most) + DECAY * p)
        path.append(p)
    return path


def sgd(p: A, mu: float, nesterov: bool) -> list[A]:
    buffer, path = np.zeros_like(p), []
    for lr in RATES:
        g = gradient(p) + DECAY * p
        buffer = mu * buffer + g
        p = p - lr * (g + mu * buffer if nesterov else buffer)
        path.append(p)
    return path


def lion(p: A) -> list[A]:
    m, path = np.zeros_like(p), []
    for lr in RATES:
        g = gradient(p)
        c = 0.9 * m + 0.1 * g
        p = p - lr * (np.sign(c) + DECAY * p)
        m = 0.95 * m + 0.05 * g
        path.append(p)
    return path


def madgrad(p: A, anchored: bool) -> list[A]:
    mu, eps, x0, s, total, path = 0.9, 1e-8, p.copy(), 0.0, 0.0, []
    for k, lr in enumerate(RATES):
        g, lr = gradient(p), lr + eps
        lam = lr * np.sqrt(k + 1)
        p = p - lr * DECAY * p
        if not anchored:
            x0 = x0 - lr * DECAY * x0
        total, s = total + lam * g * g, s + lam * g
        p = mu * p + (1 - mu) * (x0 - s / (np.cbrt(total) + eps))
        path.append(p)
    return path


def schedule_free(p: A) -> list[A]:
    b1, b2, z, x, v, total, path = 0.9, 0.95, p.copy(), p.copy(), np.zeros_like(p), 0.0, []
    for t, lr in enumerate(RATES, 1):
        y = (1 - b1) * z + b1 * x
        g = gradient(y)
        v = b2 * v + (1 - b2) * g**2
        rate = lr * np.sqrt(1 - b2**t)
        z = z - rate * g / (np.sqrt(v) + 1e-8) - rate * DECAY * y
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        path.append((1 - b1) * z + b1 * x)
    return path


def muon(p: A, nesterov: bool) -> list[A]:
    m, path = np.zeros_like(p), []
    for lr in RATES:
        g = gradient(p)
        m = 0.9 * m + g
        u = g + 0.9 * m if nesterov else m
        turned = u.shape[0] > u.shape[1]
        x = (u.T if turned else u) / np.linalg.norm(u)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        p = p - lr * (0.2 * np.sqrt(max(p.shape)) * (x.T if turned else x) + DECAY * p)
        path.append(p)
    return path


def soap(p: A) -> list[A]:
    b1, b2, every, path = 0.9, 0.95, 3, []
    m, v = np.zeros_like(p), np.zeros_like(p)
    (rows, columns) = p.shape
    left, right, ql, qr = np.zeros((rows, rows)), np.zeros((columns, columns)), np.eye(rows), np.eye(columns)
    for t, lr in enumerate(RATES, 1):
        g = gradient(p)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        n = (ql.T @ m @ qr) / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        p = p - lr * (ql @ n @ qr.T + DECAY * p)
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
        path.append(p)
    return path


def adafactor(p: A) -> list[A]:
    r, c, path = np.zeros(p.shape[0]), np.zeros(p.shape[1]), []
    for t, lr in enumerate(RATES, 1):
        g, b = gradient(p), 1 - t**-0.8
        square = g**2 + 1e-30
        r, c = b * r + (1 - b) * square.mean(1), b * c + (1 - b) * square.mean(0)
        u = g / np.sqrt(np.outer(r, c) / r.mean())
        u = u / max(1.0, np.sqrt((u**2).mean()))
        p = p - lr * (u + DECAY * p)
        path.append(p)
    return path


def sm3(p: A, mu: float, beta: float) -> list[A]:
    rows, columns, m, path = np.zeros((p.shape[0], 1)), np.zeros((1, p.shape[1])), 0.0, []
    for lr in RATES:
        g = gradient(p)
        nu = np.minimum(rows, columns)
        nu = beta * nu + (1 - beta) * g**2 if beta else nu + g**2
        top, side = nu.max(1, keepdims=True), nu.max(0, keepdims=True)
        rows, columns = (np.maximum(rows, top), np.maximum(columns, side)) if beta else (top, side)
        u = g / np.sqrt(nu + 1e-8)
        m = (1 - mu) * u + mu * m
        p = p - lr * (m + DECAY * p)
        path.append(p)
    return path


RECURRENCES: dict[str, tuple[Callable[[A], list[A]], dict[str, Any]]] = {
    "adamw": (lambda p: adam(p, True), {"type": "adamw"}),
    "adam": (lambda p: adam(p, False), {"type": "adam"}),
    "onebit_adam": (onebit_adam, {"type": "onebit_adam", "freeze_step": 3}),
    "adamw_8bit": (lambda p: adam(p, True), {"type": "adamw_8bit"}),  # too small to be packed
    "sgd": (lambda p: sgd(p, 0.0, False), {"type": "sgd", "momentum": 0.0}),
    "sgd momentum": (lambda p: sgd(p, 0.9, False), {"type": "sgd"}),
    "sgd nesterov": (lambda p: sgd(p, 0.9, True), {"type": "sgd", "nesterov": True}),
    "lion": (lion, {"type": "lion"}),
    "madgrad": (lambda p: madgrad(p, False), {"type": "madgrad"}),
    "madgrad_wd": (lambda p: madgrad(p, True), {"type": "madgrad_wd"}),
    "schedule_free": (schedule_free, {"type": "schedule_free"}),
    "muon": (lambda p: muon(p, False), {"type": "muon"}),
    "muon nesterov": (lambda p: muon(p, True), {"type": "muon", "nesterov": True}),
    "soap": (soap, {"type": "soap", "precondition_every": 3}),
    "adafactor": (adafactor, {"type": "adafactor"}),
    "sm3": (lambda p: sm3(p, 0.9, 0.95), {"type": "sm3"}),
    "sm3 sums": (lambda p: sm3(p, 0.0, 0.0), {"type": "sm3", "momentum": 0.0, "betas": [0.0, 0.0]}),
}


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
@pytest.mark.parametrize("name", RECURRENCES)
def test_path_is_that_of_the_paper(name: str, shape: tuple[int, ...]) -> None:
    recurrence, settings = RECURRENCES[name]
    for mine, theirs in zip(ours(shape, **settings), recurrence(start(shape)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11)


def test_every_optimizer_is_held_against_a_recurrence() -> None:
    assert {settings["type"] for _, settings in RECURRENCES.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_what_is_no_matrix_gets_adamw(name: str) -> None:
    for mine, theirs in zip(ours((4, 6), matrix=False, type=name), adam(start((4, 6)), True), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_newton_schulz_makes_singular_values_about_one() -> None:
    for shape in ((8, 20), (20, 8), (3, 6, 9)):
        matrix = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.6 and values.max() < 1.3  # the quintic's own band


def test_codes_of_eight_bits() -> None:
    for signed in (True, False):
        codes = codebook(signed)
        assert codes.shape == (256,) and (codes.diff() > 0).all()
        values = torch.randn(3, 1000) * torch.logspace(-4, 2, 1000)
        values = values if signed else values.square()
        packed = pack(values, codes)
        assert packed[0].numel() == 3072 and packed[0].dtype == torch.uint8
        back = unpack(packed, codes, values.shape)
        largest = packed[1].repeat_interleave(256)[:3000].view(3, 1000)
        # The coarsest step between codes is 0.9 / 64 of a block's largest; half of it is the worst error.
        assert ((back - values).abs() <= 0.9 / 64 / (1 if signed else 2) * largest).all()
        again = pack(back, codes)
        assert torch.equal(again[0], packed[0]) and torch.equal(again[1], packed[1])
    assert torch.equal(unpack(pack(torch.zeros(7), codes), codes, torch.Size([7])), torch.zeros(7))


def test_eight_bits_follow_adamw_and_are_small() -> None:
    shape = (64, SMALL // 32)
    eight, full = ours(shape, type="adamw_8bit")[-1], adam(start(shape), True)[-1]
    moved = np.abs(full - start(shape)).mean()
    assert 0 < np.abs(eight - full).mean() < 0.05 * moved
    cfg = OptimizerConfig(type="adamw_8bit")
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = optimizer_kind(cfg).make([{"params": [p], "weight_decay": 0.0, "matrix": True}], cfg)
    prepare_state(optimizer, optimizer_kind(cfg))
    p.grad = torch.randn(shape)
    optimizer.step()
    tensors = [t for value in optimizer.state[p].values() for t in (value if isinstance(value, tuple) else (value,))]
    held = sum(t.nbytes for t in tensors)
    assert held <= p.numel() * (2 + 8 / 256) + 8


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"type": "lion", "momentum": 0.5}, "momentum"),
        ({"type": "adamw", "nesterov": True}, "nesterov"),
        ({"type": "sgd", "nesterov": True, "momentum": 0.0}, "momentum"),
        ({"type": "adafactor", "betas": [0.8, 0.9]}, "betas"),
        ({"type": "muon", "precondition_every": 3}, "precondition_every"),
        ({"type": "schedule_free", "average": 0.99}, "average"),
        ({"groups": [{"match": "("}]}, "groups"),
    ],
)
def test_settings_without_use_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        OptimizerConfig(**settings)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(UserError, match="known: adafactor"):
        optimizer_kind(OptimizerConfig(type="adamww"))


def state_bytes(kind: str) -> float:
    """Bytes of state per element of a 256 x 1024 matrix, between two updates."""
    cfg = OptimizerConfig(type=kind)
    p = torch.nn.Parameter(torch.randn(256, 1024))
    optimizer = optimizer_kind(cfg).make([{"params": [p], "weight_decay": 0.0, "matrix": True}], cfg)
    prepare_state(optimizer, optimizer_kind(cfg))
    p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = [t for value in optimizer.state[p].values() for t in (value if isinstance(value, tuple) else (value,))]
    return sum(t.nbytes for t in tensors) / p.numel()


def test_the_table_of_state_sizes_says_what_is_held() -> None:
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", page, re.M))
    assert table == {kind: f"{state_bytes(kind):.2f}" for kind in OPTIMIZERS}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_plan_counts_the_state_that_is_held(kind: str) -> None:
    shapes = {"embedding.weight": (64, 80), "layers.0.mlp.up.weight": (96, 64), "layers.0.mlp.up.bias": (96,)}
    shapes |= {"layers.0.mlp.experts.up.weight": (3, 64, 48), "head.weight": (64, 80)}
    more: list[dict[str, Any]] = [] if kind == "schedule_free" else [{"average": 0.99}]
    more += [{"momentum": 0.0}] if kind in ("sgd", "sm3") else []
    for settings in [{}, *more]:
        cfg = OptimizerConfig(type=kind, **settings)
        made = optimizer_kind(cfg)
        weights = {n: torch.nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
        groups = [
            {"params": [weights[n] for n in names], "weight_decay": rule.decay, "matrix": rule.matrix}
            for rule, names in by_rule(weights, cfg, None)
        ]
        optimizer = made.make(groups, cfg)
        prepare_state(optimizer, made, cfg.average is not None)
        for p in weights.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name, p in weights.items():
            states = {n: s for n, s in optimizer.state[p].items() if n not in ("step", "weight_sum")}
            held = [t for s in states.values() for t in (s if isinstance(s, tuple) else (s,))]
            assert sum(t.nbytes for t in held) == planned(cfg, name, shapes[name]), (name, states.keys())


def test_the_last_group_that_matches_counts_alone() -> None:
    groups = [{"match": "weight", "lr": 2.0, "weight_decay": 0.5}, {"match": "up", "lr": 3.0}]
    weights = {"down.weight": torch.zeros(2, 2), "up.weight": torch.zeros(2, 2)}
    rules = {n: r for r, names in by_rule(weights, OptimizerConfig(groups=groups), None) for n in names}
    assert [(r.rate, r.decay) for r in rules.values()] == [(2.0, 0.5), (3.0, 0.1)] and list(rules) == list(weights)
