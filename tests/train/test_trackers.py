"""The same numbers in every tracker that is installed, over two sittings of one run; what they refuse."""

from __future__ import annotations

import pytest

from castalia.config import Config
from castalia.errors import CheckFailed, UserError
from castalia.tools.tracker_numbers import TRACKERS, installed, largest_difference, log_everywhere
from castalia.train.run import train


@pytest.fixture(scope="module")
def logged(tiny_data, tmp_path_factory):
    """What the run recorded, and what each tracker has of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        values = {
            "name": "tiny",
            "output": str(tmp_path_factory.mktemp("logged") / "run"),
            "data": {"path": str(tiny_data), "split": "80,20,0", "seq_length": 32},
            "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4},
            "training": {"steps": 6, "batch_size": 8, "micro_batch_size": 4},
            "evaluation": {"interval": 3, "batches": 1},
            "checkpoint": {"interval": 3},
            "performance": {"threads": 1, "peak_flops": 1e11},
        }
        return log_everywhere(values, installed())


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_holds_every_number(name, logged):
    expected, held = logged
    if name not in held:
        pytest.skip(f"{TRACKERS[name].package} is not installed")
    assert ("train/lm_loss", 6) in expected and ("validation/lm_loss", 3) in expected
    assert any(key.startswith("gradient_norms/") for key, _ in expected)
    assert largest_difference(expected, held[name]) < 1e-6


def test_a_number_that_is_missing_or_off_is_found():
    expected = {("a", 1): 1.0, ("b", 1): 0.0}
    assert largest_difference(expected, dict(expected)) == 0
    with pytest.raises(CheckFailed, match="1 of 2 numbers are missing"):
        largest_difference(expected, {("a", 1): 1.0})
    with pytest.raises(CheckFailed, match="is 1.1, not 1.0"):
        largest_difference(expected, expected | {("a", 1): 1.1})


@pytest.mark.parametrize(
    ("logging", "message"),
    [
        ({"comet_name": "x"}, "comet_project"),
        ({"mlflow_uri": "x"}, "mlflow_experiment"),
        ({"comet_tags": ["a"]}, "comet"),
    ],
)
def test_settings_without_their_tracker_are_refused(tiny_values, logging, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tiny_values | {"logging": logging})


def test_a_missing_package_is_named(tiny_values, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(UserError, match=r"pip install 'castalia\[comet\]'"):
        train(Config.model_validate(tiny_values | {"logging": {"comet_project": "x"}}), quiet=True)
