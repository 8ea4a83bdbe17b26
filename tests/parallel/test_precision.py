"""fp16 with its loss scale, and fp8, under layouts against one process; an overflow is one for all ranks."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from castalia.config import Config
from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.errors import UserError
from castalia.optim.loss_scale import LossScaler
from castalia.parallel.layout import layout_of
from castalia.parallel.mesh import Mesh
from castalia.parallel.parallelize import check_model
from castalia.parallel.testing import run_in_processes
from castalia.tools.verify import InventedText, layout_named, shrink, verify_layouts, with_settings
from castalia.tools.verify_compare import Trace, compare
from castalia.train.assemble import assemble

STEPS, PLANTED = 4, 1
# A rounding of fp16 is 5e-4; Adam's steps make more of it where a gradient is near zero.
TOLERANCE = 2e-2


def trained(world: Any, config: Config) -> tuple[Trace, list[float]]:
    """In each process: a few steps, one of which overflows; losses, norms and weights, and the scale after each."""
    mesh = Mesh(layout_of(config.parallel, world.size), world)
    parts, scaler = assemble(config, mesh), LossScaler(config.training)
    plan = RunPlan(config.training.batch_size, config.data.seq_length, STEPS)
    source = cast(Any, InventedText(config.data.seq_length, config.model.vocab_size or 2))
    loader = Loader(source, plan, Shard(mesh.data_rank, mesh.layout.data), config.micro_batch_size, 0, eod=0)
    trace, scales = Trace(), []
    for step in range(STEPS):
        batches = loader.batch(plan.at(step))
        tokens = parts.count(sum(batch.num_tokens for batch in batches))
        parts.engine.loss_scale = 2.0**60 if step == PLANTED else scaler.scale
        stats = parts.engine.forward_backward(batches, tokens, step)
        scaler.unscale(parts.store.gradient_buffers())
        norm = parts.store.gradient_norm().item()
        finite = math.isfinite(norm)
        assert finite is (step != PLANTED) and scaler.update(finite)
        if finite:
            parts.store.step(1e-3)
            trace.norms.append(norm)
        else:
            parts.store.discard()
        trace.losses.append(stats.loss)
        scales.append(scaler.scale)
    for key, tensor in parts.store.tensors().items():
        local = getattr(tensor, "local", tensor)
        if key.startswith("model.") and local.numel():
            trace.weights[key.removeprefix("model.")] = parts.part(key.removeprefix("model."), local)
    return trace, scales


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The configuration, and what one process makes of it."""
    training = {"steps": 10, "precision": "fp16", "initial_scale_power": 10, "loss_scale_hysteresis": 1}
    config = shrink(Config.model_validate({"training": training}))
    return config, run_in_processes(1, trained, config, joined=False)[0]


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2", "cp2", "zero1", "zero2", "zero3"])
def test_fp16_trains_as_one_process(alone, name):
    config, (expected, scales) = alone
    assert scales == [1024.0, 512.0, 512.0, 512.0]
    processes, settings = layout_named(name)
    results = run_in_processes(processes, trained, with_settings(config, settings))
    assert all(found == scales for _, found in results)
    verdict = compare(name, expected, [trace for trace, _ in results], TOLERANCE)
    assert verdict.good and max(verdict.loss, verdict.norm) < 1e-3, verdict


@pytest.mark.parametrize(("name", "limit"), [("zero3", 0.1), ("tp2", 0.3)])
def test_fp8_trains_as_one_process_but_for_its_rounding(config_of, name, limit):
    """Tensor-parallel ranks scale their parts by themselves; what Adam makes of a gradient near zero does not count."""
    (verdict,) = verify_layouts(config_of("training.precision=fp8"), [name], math.inf)
    assert max(verdict.loss, verdict.norm) < 0.05 and verdict.gradient < limit, verdict


def test_what_fp8_does_not_go_with_is_refused(config_of):
    for settings in ({"performance.compile": True}, {"pipeline": 2, "schedule": "zero_bubble"}):
        spread = with_settings(shrink(config_of("training.precision=fp8")), settings)
        with pytest.raises(UserError, match="training.precision fp8 and"):
            check_model(spread, layout_of(spread.parallel, spread.parallel.pipeline))
