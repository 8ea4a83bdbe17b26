"""What a run is refused for before anything of it is written, and what `config check` says of the same."""

from __future__ import annotations

import pytest
import torch

from castalia.config import Config
from castalia.errors import UserError
from castalia.model.soft_prompt import SoftPrompt
from castalia.train import preflight
from castalia.train.run import Run, train


def config(values, **changes):
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            merged.setdefault(section, {})[name] = value
        else:
            merged[section] = value
    return Config.model_validate(merged)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm": "batch"}, "model.norm"),
        ({"model__activation": "sine"}, "model.activation"),
        ({"model__init_method": "zeros"}, "model.init_method"),
        ({"optimizer__type": "adamx"}, "optimizer.type"),
        ({"optimizer__groups": [{"match": "embeding"}]}, "'embeding' matches none of the parameters that are trained"),
        ({"optimizer__groups": [{"match": "layers"}], "model__soft_prompt_tokens": 4}, "'layers' matches none"),
        ({"performance__device": "cuda:99"}, "performance.device"),
        ({"start__path": "nowhere"}, "start.path"),
        ({"data__path": "nowhere"}, "nowhere"),
        ({"tokenizer": {"path": "nowhere.json"}}, "nowhere.json"),
        ({"training__steps": 0}, "training.steps"),
        ({"model__hidden_size": 1 << 20}, "GB"),
        ({"training__batch_size": 1 << 30, "training__micro_batch_size": 1 << 30}, "micro_batch_size"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(tiny_values, tmp_path, changes, words) -> None:
    with pytest.raises(UserError, match=words):
        Run(config(tiny_values, **changes))
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_fit_leaves_no_folder(tiny_values, tmp_path) -> None:
    train(config(tiny_values, output=str(tmp_path / "first")), quiet=True)
    wider = config(tiny_values, model__hidden_size=64, start__path=str(tmp_path / "first"), start__optimizer=False)
    with pytest.raises(UserError), Run(wider, quiet=True):
        pass
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_files_is_no_place_for_a_run(tiny_values, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"photo\.jpg"):
        Run(config(tiny_values))
    preflight.check_directory(str(tmp_path / "new"))


def test_a_soft_prompt_begins_as_its_text_and_goes_on_as_it_was_trained(tiny_values, tmp_path) -> None:
    train(config(tiny_values, output=str(tmp_path / "first")), quiet=True)
    more = {"model__soft_prompt_tokens": 3, "model__soft_prompt_text": "ab", "start__optimizer": False}
    tuned = config(tiny_values, start__path=str(tmp_path / "first"), **more)
    with Run(tuned, quiet=True) as run:
        assert isinstance(run.model.soft_prompt, SoftPrompt)
        rows = run.model.embedding.weight[torch.tensor([97, 98, 97])]  # bytes of `aba`, of the weights that were read
        assert torch.equal(run.model.soft_prompt.weight, rows)
        run.train()
        trained = run.model.soft_prompt.weight.clone()
        assert not torch.equal(trained, rows)
    with Run(tuned, quiet=True) as again:
        assert torch.equal(again.model.soft_prompt.weight, trained)
    after = config(tiny_values, start__path=str(tmp_path / "run"), output=str(tmp_path / "third"), **more)
    with Run(after, quiet=True) as third:  # it was read, so the text does not count
        assert torch.equal(third.model.soft_prompt.weight, trained)
