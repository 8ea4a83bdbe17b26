"""Every optimizer under layouts that cut its matrices, against one process; and its state in a checkpoint."""

import pytest
import torch

from castalia.config import OptimizerConfig
from castalia.optim.optimizers import OPTIMIZERS
from castalia.optim.weights import PlainStore
from castalia.parallel.mesh import local_mesh
from castalia.parallel.plans import Place
from castalia.parallel.store import SpreadStore
from castalia.tools.verify import verify_layouts, verify_resume

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
