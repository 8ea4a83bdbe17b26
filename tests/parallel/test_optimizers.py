"""Every optimizer under layouts that cut its matrices, against one process; and its state in a checkpoint."""

import numpy as np
import pytest
import torch

from castalia.checkpoint import load_checkpoint, save_checkpoint, tensor_shapes
from castalia.config import OptimizerConfig
from castalia.errors import UserError
from castalia.optim.optimizers import OPTIMIZERS
from castalia.optim.weights import PlainStore
from castalia.parallel.layout import Layout, check_layout
from castalia.parallel.mesh import Mesh, local_mesh
from castalia.parallel.plans import Place
from castalia.parallel.store import SpreadStore
from castalia.parallel.testing import run_in_processes
from castalia.tools.replay import _begin as begin_replay
from castalia.tools.verify import verify_layouts, verify_resume
from castalia.train.resume import rank_states

# Each with a layout that cuts rows, columns or both, and one rank without some parameters.
LAYOUTS = {
    "adam": "zero1",
    "sgd": "tp2",
    "lion": "zero3",
    "madgrad": "pp2",
    "schedule_free": "zero3",
    "muon": "zero3cp2tp2",
    "soap": "tp2pp2",
    "adafactor": "zero2",
    "sm3": "tp2",
}
ALIKE = {
    "adamw": "tests/parallel/test_layouts.py",
    "madgrad_wd": "madgrad, but for what decays",
    "adamw_8bit": "its blocks of 256 follow the shards: equal only to eight bits",
    "onebit_adam": "below, since what is compressed differs",
}


def test_no_optimizer_is_left_out():
    assert LAYOUTS.keys() | ALIKE.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_trains_as_one_process(config_of, kind):
    # Lion's step is a sign: one that rounding turns moves a weight by twice the rate, so the rate is small.
    rate = "optimizer.lr=1e-5" if kind in ("lion",) else "optimizer.lr=1e-3"
    # The bias of keys has no gradient but rounding, which Adafactor's own eps of 1e-30 would make a step of.
    plain = ("model.attention_bias=false",) if kind == "adafactor" else ()
    (verdict,) = verify_layouts(config_of(f"optimizer.type={kind}", rate, *plain), [LAYOUTS[kind]])
    assert verdict.good, verdict


@pytest.mark.parametrize(("kind", "before", "after"), [("soap", "zero3pp2", "tp2"), ("schedule_free", "tp2", "zero3")])
def test_states_of_whole_matrices_go_from_layout_to_layout(config_of, kind, before, after):
    verdict = verify_resume(config_of(f"optimizer.type={kind}"), before, after)
    assert verdict.good, verdict


@pytest.mark.parametrize("layout", ["zero3", "tp2pp2"])
def test_stable_embeddings_train_in_a_layout_as_on_one_process(config_of, layout):
    model = ("model.stable_embedding=both", "model.position=learned", "model.tie_embeddings=true")
    (verdict,) = verify_layouts(config_of(*model), [layout])
    assert verdict.good, verdict


def test_averages_of_weights_go_from_layout_to_layout(config_of):
    verdict = verify_resume(config_of("optimizer.average=0.9"), "zero3pp2", "tp2")
    assert verdict.good, verdict


def test_a_square_state_is_no_part_of_a_matrix_that_is_shaped_alike():
    """Half of a matrix of 8 x 4 is as large as the basis of its columns."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False)])})
    cfg = OptimizerConfig(type="soap")
    places = {"layers.0.weight": Place((8, 4), (4, 0), (4, 4))}
    store = SpreadStore(PlainStore(model, cfg, None), places, local_mesh(), {"layers.0.weight": (8, 4)}, cfg)
    held = {name.removeprefix("optimizer.layers.0.weight."): piece for name, piece in store.tensors().items()}
    assert (held["model.layers.0.weight"].shape, held["model.layers.0.weight"].offset) == ((8, 4), (4, 0))
    assert (held["right"].shape, held["right_basis"].shape, held["left"].shape) == ((4, 4), (4, 4), (8, 8))
    assert held["right"].offset == (0, 0)


ONE_BIT = OptimizerConfig(type="onebit_adam", betas=[0.5, 0.99], freeze_step=4, weight_decay=0.0)


def one_bit_gradient(name, p, rank, step):
    noise = np.random.default_rng([len(name), rank, step]).normal(size=p.shape)
    return p + 0.3 + noise


def one_bit_store(mesh):
    """Two tensors in fp64, of which every rank has all."""
    model = torch.nn.Linear(20, 6).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.linspace(-1, 1, 120).reshape(6, 20)))
        model.bias.fill_(0.5)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    places = {n: Place(s, (0,) * len(s), s, mesh.layout.world) for n, s in shapes.items()}
    return SpreadStore(PlainStore(model, ONE_BIT, None), places, mesh, shapes, ONE_BIT)


def one_bit_steps(store, mesh, first, last):
    """The norms that the store tells, and weights after each step."""
    norms, path = [], []
    for step in range(first, last):
        for name, p in store.trained.items():
            share = one_bit_gradient(name, p.detach().numpy(), mesh.data_rank, step) / mesh.layout.data
            p.grad = torch.from_numpy(share)
        store.reduce()
        norms.append(store.gradient_norm().item())
        store.step(0.01, torch.tensor(2.0, dtype=torch.float64))  # as if each gradient were clipped to a half
        path.append({n: p.detach().numpy().copy() for n, p in store.trained.items()})
    return norms, path


def one_bit_run(world, folder):
    """Train on, and again from a checkpoint in the middle of what is compressed."""
    mesh = Mesh(Layout(replicate=world.size), world)
    store = one_bit_store(mesh)
    norms, path = one_bit_steps(store, mesh, 0, 6)
    if folder is not None:
        save_checkpoint(folder, 6, store.tensors(), {})
    more_norms, more = one_bit_steps(store, mesh, 6, 10)
    again = one_bit_store(mesh)
    if folder is not None:
        load_checkpoint(folder / "step-00000006", again.tensors())
        again.set_updates(6)
        _, resumed = one_bit_steps(again, mesh, 6, 10)
        assert all(np.array_equal(a[n], b[n]) for a, b in zip(more, resumed, strict=True) for n in a)
    return norms + more_norms, path + more, store.optimizer.sent


def one_bit_in_numpy(ranks):
    """Tang et al. 2021 for both tensors; vectors stay with Adam."""
    held = {"weight": np.linspace(-1, 1, 120).reshape(6, 20), "bias": np.full(6, 0.5)}
    m, v = ({n: np.zeros_like(p) for n, p in held.items()} for _ in range(2))
    errors, server = [np.zeros((6, 20)) for _ in range(ranks)], np.zeros((6, 20))

    def compressed(x):
        return np.where(x >= 0, 1.0, -1.0) * np.sqrt((x**2).mean(-1, keepdims=True))

    norms, path = [], []
    for step in range(10):
        grads = {n: [one_bit_gradient(n, p, i, step) for i in range(ranks)] for n, p in held.items()}
        means = {n: sum(g) / ranks for n, g in grads.items()}
        norms.append(np.sqrt(sum((g**2).sum() for g in means.values())))
        for n, p in held.items():
            g = means[n] / 2
            if n == "bias" or step < 4:
                m[n], v[n] = 0.5 * m[n] + 0.5 * g, 0.99 * v[n] + 0.01 * g**2
            else:
                exact = [0.5 * m[n] + 0.25 * grads[n][i] + errors[i] for i in range(ranks)]
                errors = [x - compressed(x) for x in exact]
                mean = sum(compressed(x) for x in exact) / ranks + server
                m[n], server = compressed(mean), mean - compressed(mean)
            most = 0.5 / np.sqrt(0.01 * (1 - 0.25 / 0.99))  # what Adam can reach
            held[n] = p - 0.01 * np.clip(m[n] / (np.sqrt(v[n]) + 1e-8), -most, most)
        path.append(dict(held))
    return norms, path


def test_signs_over_gloo_train_as_the_paper_says_and_resume_bit_by_bit(tmp_path):
    folder = tmp_path / "checkpoints"
    results = run_in_processes(2, one_bit_run, folder)
    norms, expected = one_bit_in_numpy(2)
    for mine, path, sent in results:
        for found, wanted in zip(path, expected, strict=True):
            for n in wanted:
                np.testing.assert_allclose(found[n], wanted[n], rtol=0, atol=1e-9)
        assert mine[:4] == pytest.approx(norms[:4]) and mine[4:] == pytest.approx(norms[4:], rel=0.1)
        assert mine == results[0][0]  # all ranks clip alike
        assert sent == 6 * 2 * 3 * (8 + 3)  # six updates, two exchanges, three rows, scales of fp64 and 20 bits each
    # Another number of ranks has no use for the errors, and begins at zero.
    alone = one_bit_store(local_mesh())
    tensors, leave, said = rank_states(alone.tensors(), folder / "step-00000006")
    assert leave == {"optimizer.weight.worker_error", "optimizer.weight.server_error"} and "begin at zero" in said[0]
    assert tensor_shapes(folder / "step-00000006")["optimizer.weight.worker_error"] == (2, 6, 20)
    load_checkpoint(folder / "step-00000006", tensors, leave=leave)
    np.testing.assert_allclose(alone.trained["weight"].detach().numpy(), expected[5]["weight"], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="from step 5 on updates need what several processes exchanged"):
        begin_replay(tmp_path, 7, alone, ONE_BIT.freeze_step)


def test_the_warm_up_of_one_bit_adam_is_that_of_one_process(config_of):
    (verdict,) = verify_layouts(config_of("optimizer.type=onebit_adam", "optimizer.lr=1e-3"), ["dp2"])
    assert verdict.good, verdict


@pytest.mark.parametrize(
    ("layout", "settings", "said"),
    [
        (Layout(tensor=2), (), "set parallel.zero=0"),
        (Layout(pipeline=2), (), "set parallel.zero=0"),
        (Layout(shard=2, zero=1), (), "set parallel.zero=0"),
        (Layout(replicate=2), ("logging.noise_scale=true",), "logging.noise_scale looks at whole gradients"),
        (Layout(replicate=2), ("logging.norms=[gradient]",), "logging.norms gradient looks at whole gradients"),
    ],
)
def test_one_bit_adam_is_for_plain_data_parallelism(config_of, layout, settings, said):
    config = config_of("optimizer.type=onebit_adam", "training.micro_batch_size=4", *settings)
    with pytest.raises(UserError, match=said):
        check_layout(config, layout)
