"""`castalia verify`: what it prints, and how it leaves."""

import json

import pytest

from castalia.cli import main


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(json.dumps({"version": 1, "training": {"steps": 10}}), encoding="utf-8")
    return str(path)


def test_layouts_that_train_alike(config, capsys):
    assert main(["verify", "layouts", config, "--layouts", "dp2", "--layout", "zero=1,procs=2", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["verdicts"]
    assert first["good"] and first["layout"] == "dp2" and first["first"] is None and 0 <= first["loss"] < 1e-5
    assert second["good"] and second["layout"] == "zero=1,procs=2" and second["processes"] == 2


def test_a_fault_is_named_and_leaves_with_4(config, capsys):
    assert main(["verify", "layouts", config, "--layouts", "dp2", "--plant", "averaged_loss"]) == 4
    assert "DIFFERS, look at the loss (the gradient that it passes on)" in capsys.readouterr().out


def test_a_killed_job_goes_on(config, capsys):
    assert main(["verify", "resume", config, "--before", "dp2", "--after", "tp2"]) == 0
    assert "dp2 -> tp2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--plant", "bad_luck"], "'bad_luck' is not known"),
        (["--layouts", "dp3"], "layout 'dp3' is not known"),
        (["--layouts", "ep2"], "parallel.expert 2"),
    ],
)
def test_what_cannot_be_is_said(config, capsys, flags, text):
    assert main(["verify", "layouts", config, *flags]) == 2
    assert text in capsys.readouterr().err
