"""State on the host in layouts: on a CPU the same bits, and the stores that a device would have, forced onto a CPU."""

import re

import pytest

from castalia.errors import UserError
from castalia.parallel import parallelize
from castalia.parallel.layout import check_layout, layout_of
from castalia.parallel.shards import HostShardedStore
from castalia.parallel.testing import run_in_processes
from castalia.tools.verify import shrink, train_small, with_settings


def traced(world, config, forced):
    """What some steps of training did; `forced`: as if the device were none that shares the host's memory."""
    steps, usual = [], HostShardedStore.step
    HostShardedStore.step = lambda self, *args: (steps.append(1), usual(self, *args))[1]
    if forced:
        parallelize.offloads = lambda config, device: True
    trace = train_small(world, config, 3)
    assert len(steps) == 3 * forced
    return trace.losses, trace.norms, trace.weights


@pytest.mark.parametrize(
    ("zero", "offload", "forced", "precision"),
    [
        (1, "optimizer", False, "fp32"),
        (1, "optimizer", True, "fp32"),
        (3, "optimizer", True, "bf16"),
        (3, "parameters", False, "fp32"),
        (3, "parameters", False, "bf16"),
    ],
)
def test_a_layout_trains_to_the_same_bits(config_of, zero, offload, forced, precision):
    base = shrink(config_of(f"training.precision={precision}"))
    expected = run_in_processes(2, traced, with_settings(base, {"zero": zero}), False)
    spread = with_settings(base, {"zero": zero, "offload": offload})
    for (losses, norms, weights), (their_losses, their_norms, theirs) in zip(
        run_in_processes(2, traced, spread, forced), expected, strict=True
    ):
        assert losses == their_losses and norms == their_norms
        assert weights.keys() == theirs.keys()
        assert all((weights[n][0] == theirs[n][0]).all() for n in theirs)


def test_offloaded_weights_need_ranks_to_spread_over(config_of):
    config = with_settings(shrink(config_of()), {"zero": 3, "offload": "parameters"})
    with pytest.raises(UserError, match=re.escape("ZeRO spreads over one here")):
        check_layout(config, layout_of(config.parallel, 1))
    with pytest.raises(UserError, match=r"parallel\.zero=3"):
        config_of("parallel.offload=parameters", "parallel.zero=2")
