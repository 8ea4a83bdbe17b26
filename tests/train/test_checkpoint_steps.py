"""When a checkpoint is due: every so many steps, on a log scale, at steps of one's own, and once at the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config import CheckpointConfig, Config
from castalia.config.load import from_yaml
from castalia.errors import UserError
from castalia.train.loop import saves
from castalia.train.run import Run, train


def due(cfg, steps):
    return [step for step in range(1, steps + 1) if saves(step, cfg)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": 20}, [20, 40, 60, 80, 100]),
        ({"interval": None}, []),
        ({"interval": 40, "extra_steps": [0, 7, 80]}, [7, 40, 80]),
        ({"scale": "log", "log_factor": 2.0}, [1, 2, 4, 8, 16, 32, 64]),
        ({"scale": "log", "log_factor": 10.0, "extra_steps": [50]}, [1, 10, 50, 100]),
        # int(1.5 ** k): 1, 1, 2, 3, 5, 7, 11, ...
        ({"scale": "log", "log_factor": 1.5}, [1, 2, 3, 5, 7, 11, 17, 25, 38, 57, 86]),
    ],
)
def test_steps_at_which_to_save(settings, expected):
    assert due(CheckpointConfig(**settings), 100) == expected


@given(st.floats(1.01, 50), st.integers(1, 3000))
def test_the_log_scale_is_gptneox_s(factor, steps):
    """Its predicate of 2026: the step is among int(factor ** k), k = 0, 1, 2, ..."""
    cfg = CheckpointConfig(scale="log", log_factor=factor)
    powers = set()
    while int(factor ** len(powers)) <= steps and len(powers) < 1000:
        k = len(powers)
        powers.add((k, int(factor**k)))
    assert due(cfg, steps) == sorted({power for _, power in powers})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint: {scale: log, log_factor: 1}", "f.yml:1: checkpoint.log_factor 1 must be above 1"),
        ("checkpoint: {scale: log, log_factor: 0.5}", "checkpoint.log_factor 0.5 must be above 1"),
        ("checkpoint: {scale: log}", "checkpoint.scale log needs checkpoint.log_factor, for example 2"),
        ("checkpoint: {log_factor: 2}", "checkpoint.log_factor is for checkpoint.scale log"),
    ],
)
def test_scales_that_make_no_sense(text, message):
    with pytest.raises(UserError) as error:
        from_yaml(text, "f.yml")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": 4}, [4, 8, 12]),  # the last step is due and the last: saved once
        ({"interval": 5, "extra_steps": [0, 12]}, [0, 5, 10, 12]),
        ({"scale": "log", "log_factor": 3.0}, [1, 3, 9, 12]),
        ({"interval": None}, [12]),
    ],
)
def test_a_run_saves_once_at_each(settings, expected, tiny_values, monkeypatch):
    saved = []
    real = Run.save
    monkeypatch.setattr(Run, "save", lambda run, required=True: saved.append(run.step) or real(run, required))
    config = Config.model_validate(tiny_values | {"checkpoint": settings})
    run = train(config, quiet=True)
    names = sorted(path.name for path in run.checkpoints.iterdir() if path.name.startswith("step-"))
    assert saved == expected and names == [f"step-{step:08d}" for step in expected]
    train(config, quiet=True)
    assert saved == expected  # a finished run has nothing to save


def test_step_0_is_not_saved_again(tiny_values, monkeypatch):
    """The run dies in its first step, after saving step 0; it goes on from there."""
    config = Config.model_validate(tiny_values | {"checkpoint": {"extra_steps": [0]}})
    with Run(config, quiet=True) as run:
        run.engine.forward_backward = lambda *args: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run.train()
    with Run(config, quiet=True) as run:
        assert run.resumed and run.step == 0
        monkeypatch.setattr(run, "save", lambda required=True: None if run.step else 1 / 0)
        run.train()
