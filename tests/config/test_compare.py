import pytest

from castalia.config.compare import RESUME_RULES, differences
from castalia.config.derive import derive
from castalia.config.fields import fields
from castalia.config.load import load


def kinds(old: list[str], new: list[str]) -> dict[str, str]:
    return {d.key: d.kind for d in differences(*(derive(load([], s), 300)[0] for s in (old, new)))}


def test_nothing_differs_from_itself() -> None:
    assert kinds(["training.steps=5"], ["training.steps=5"]) == {}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.lr=0.5", {"optimizer.lr": "numerics"}),
        ("model.num_layers=7", {"model.num_layers": "numerics"}),
        (
            "training.batch_size=64",
            {"training.batch_size": "numerics", "training.micro_batch_size": "performance"},
        ),
        ("training.micro_batch_size=4", {"training.micro_batch_size": "performance"}),
        ("performance.compile=true", {"performance.compile": "performance"}),
        ("logging.interval=1", {"logging.interval": "cosmetic"}),
        ("name=other", {"name": "cosmetic"}),
        ("tokenizer.path=elsewhere", {"tokenizer.path": "place"}),
        ("model.vocab_multiple=64", {"model.vocab_multiple": "numerics", "model.vocab_size": "numerics"}),
        ("model.vocab_multiple=384", {"model.vocab_multiple": "cosmetic"}),
        # Said where it was derived before: nothing differs.
        ("data.seed=1234", {}),
        ("schedule.decay_steps=1000", {}),
    ],
)
def test_kinds(setting: str, expected: dict[str, str]) -> None:
    assert kinds([], [setting]) == expected


def test_training_is_prolonged_by_keeping_the_schedule() -> None:
    old = ["training.steps=100"]
    assert kinds(old, ["training.steps=200"]) == {
        "training.steps": "length",
        "schedule.decay_steps": "numerics",
    }
    assert kinds(old, ["training.steps=200", "schedule.decay_steps=100"]) == {"training.steps": "length"}
    assert kinds(old, ["training.steps=null", "training.tokens=3_276_800", "schedule.decay_steps=100"]) == {
        "training.steps": "length"
    }


def test_steps_of_configurations_that_are_not_derived_are_not_trusted() -> None:
    old, new = load([], ["training.steps=100"]), load([], ["training.steps=200"])
    assert [(d.key, d.kind) for d in differences(old, new)] == [("training.steps", "numerics")]


def test_micro_batches_matter_where_their_means_are_uneven() -> None:
    uneven = ["loss.normalisation=micro_batch_mean", "data.mask_loss_at_eod=true"]
    small = "training.micro_batch_size=4"
    assert kinds(uneven, [*uneven, small]) == {"training.micro_batch_size": "numerics"}
    assert kinds(uneven[:1], [uneven[0], small]) == {"training.micro_batch_size": "performance"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("data.path=a/x", "data.path=b/y", {"data.path": "place"}),
        ("data.train_paths=[a/x, a/y]", "data.train_paths=[b/x, b/y]", {"data.train_paths": "place"}),
        ("data.train_paths=[a/x, a/y]", "data.train_paths=[a/y, a/x]", {"data.train_paths": "numerics"}),
        (
            "data.path=a/x",
            "data.train_paths=[a/x]",
            {"data.path": "numerics", "data.train_paths": "numerics", "data.train_weights": "numerics"},
        ),
    ],
)
def test_data_that_has_moved(old: str, new: str, expected: dict[str, str]) -> None:
    assert kinds([old], [new]) == expected


def test_rules_are_about_keys_that_exist() -> None:
    assert RESUME_RULES.keys() <= {key for key, _ in fields()}
