"""An interrupted run whose YAML was edited: what is said of one field of each class, and what is refused."""

import pytest
import yaml

from castalia.cli import main
from castalia.train.metrics import read_metrics


@pytest.fixture
def interrupted(tiny_values, tmp_path, capsys):
    """The file of a run that stopped after step 4 of 12; a change of it, and the words of going on."""
    path = tmp_path / "tiny.yml"

    def write(values: dict) -> None:
        path.write_text(yaml.safe_dump({k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}))

    write(tiny_values)
    assert main(["train", str(path), "training.exit_interval=4", "--no-report"]) == 3
    capsys.readouterr()

    def go_on(section: str, key: str, value: object, *flags: str, code: int = 0) -> str:
        write(
            tiny_values | {section: dict(tiny_values[section]) | {key: value}}
            if section
            else {**tiny_values, key: value}
        )
        assert main(["train", str(path), "--no-report", *flags]) == code
        err = capsys.readouterr().err
        records = read_metrics(tmp_path / "run" / "metrics.jsonl")
        last = [record["step"] for record in records if record["kind"] == "train"][-1]
        assert last == (12 if code == 0 else 4)
        return err

    return go_on


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("optimizer", "lr", 0.02, "optimizer.lr: 0.01 -> 0.02"),
        ("optimizer", "betas", [0.9, 0.9], "optimizer.betas: [0.9, 0.95] -> [0.9, 0.9]"),
        ("model", "rotary_fraction", 1.0, "model.rotary_fraction: 0.5 -> 1.0"),
        ("training", "batch_size", 16, "training.batch_size: 8 -> 16"),
        # The schedule would follow the new length.
        ("training", "steps", 13, "schedule.decay_steps: 12 -> 13"),
    ],
)
def test_numerics_are_refused_with_the_list(interrupted, section, key, value, said) -> None:
    message = interrupted(section, key, value, code=2)
    assert "this run was started with other settings that change what is computed" in message
    assert said in message
    assert "go on knowingly with --accept" in message
    assert message.count("\n") == 1


def test_numerics_may_be_accepted(interrupted, tmp_path) -> None:
    text = interrupted("optimizer", "lr", 0.02, "--accept")
    assert "going on with changed settings, as accepted: optimizer.lr: 0.01 -> 0.02" in text
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "changed settings were accepted: optimizer.lr: 0.01 -&gt; 0.02" in (tmp_path / "run/report.html").read_text()


def test_other_shapes_cannot_be_accepted(interrupted) -> None:
    text = interrupted("model", "hidden_size", 64, "--accept", code=2)
    assert "has other shapes" in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        (
            "training",
            "micro_batch_size",
            2,
            "changed since the checkpoint, performance (changes only rounding or speed): "
            "training.micro_batch_size: 4 -> 2",
        ),
        (
            "performance",
            "arena",
            False,
            "changed since the checkpoint, performance (changes only rounding or speed): "
            "performance.arena: True -> False",
        ),
        (
            "checkpoint",
            "interval",
            6,
            "changed since the checkpoint, cosmetic (changes neither what is computed nor its speed): "
            "training.exit_interval: 4 -> None; checkpoint.interval: 4 -> 6",
        ),
    ],
)
def test_performance_and_cosmetic_are_said_and_accepted(interrupted, section, key, value, said) -> None:
    text = interrupted(section, key, value)
    assert said in " ".join(text.split())
    assert "as accepted" not in text


def test_what_has_not_changed_is_not_said(interrupted) -> None:
    text = " ".join(interrupted("optimizer", "lr", 0.01).split())
    assert "training.exit_interval: 4 -> None" in text  # given on the command line before, and not now
    assert text.count("changed since the checkpoint") == 1
