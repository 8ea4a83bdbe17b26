"""Where a translated run begins, saves and logs."""

import json
from typing import Any

import pytest

from castalia.config import Config, load, notes
from castalia.config.fields import flat
from castalia.errors import UserError

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "train_iters": 100,
    "train_micro_batch_size_per_gpu": 2,
    "checkpoint_factor": 10,
    "optimizer": {"type": "Adam", "params": {}},
}
NOTHING = {"start.path": None, "start.step": None, "start.optimizer": True}
WANDB = {f"logging.wandb_{key}": None for key in ("project", "group", "entity", "name", "host")}

NO_PROFILE = {
    "profile.start": None,
    "profile.stop": None,
    "profile.trace": True,
    "profile.memory": False,
    "profile.modules": None,
    "profile.folder": None,
    "profile.synchronise": False,
}


@pytest.fixture
def translated(tmp_path):
    def translated(**more: Any) -> Config:
        (tmp_path / "small.yml").write_text(json.dumps(SMALL | more))
        return load([tmp_path / "small.yml"])

    return translated


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, NOTHING),
        ({"save": "a", "load": "a"}, NOTHING),
        ({"finetune": True, "iteration": 3, "no_load_optim": True}, NOTHING),
        ({"save": "a", "load": "b"}, NOTHING | {"start.path": "b", "output": "a"}),
        ({"load": "b", "iteration": 30}, NOTHING | {"start.path": "b", "start.step": 30, "output": None}),
        ({"save": "a", "load": "b", "finetune": True}, NOTHING | {"start.path": "b", "start.optimizer": False}),
        ({"save": "a", "load": "a", "finetune": True}, NOTHING | {"start.path": "a", "start.optimizer": False}),
        ({"load": "b", "no_load_optim": True}, NOTHING | {"start.path": "b", "start.optimizer": False}),
        ({"checkpoint_scale": "log"}, {"checkpoint.scale": "log", "checkpoint.log_factor": 10.0}),
        ({"checkpoint_scale": "log", "checkpoint_factor": 1.5}, {"checkpoint.log_factor": 1.5}),
        (
            {"checkpoint_scale": "log", "checkpoint_factor": None, "extra_save_iters": [4]},
            {"checkpoint.scale": "linear", "checkpoint.interval": None, "checkpoint.extra_steps": [4]},
        ),
        ({"log_dir": "logs", "tensorboard_dir": "tb"}, {"logging.log_dir": "logs", "logging.tensorboard": "tb"}),
        ({"log_grad_norm": True, "log_optimizer_states": True}, {"logging.norms": ["gradient", "optimizer"]}),
        ({"log_grad_norm": False}, {"logging.norms": []}),
        ({"log_grad_pct_zeros": True, "char_level_ppl": True}, {"logging.zero_gradients": True}),
        ({"char_level_ppl": True}, {"evaluation.characters": True}),
        ({}, NO_PROFILE),
        ({"profile_step_start": 3, "memory_profiling_path": "p", "flops_profiler": {"enabled": False}}, NO_PROFILE),
        (
            {"profile": True},
            NO_PROFILE | {"profile.start": 11, "profile.stop": 12, "profile.trace": True},
        ),
        (
            {"memory_profiling": True, "memory_profiling_path": "p", "profile_step_start": 0, "profile_step_stop": 1},
            NO_PROFILE
            | {"profile.start": 1, "profile.stop": 1, "profile.trace": False, "profile.memory": True}
            | {"profile.folder": "p"},
        ),
        ({"profile": True, "train_iters": 5}, NO_PROFILE),
        ({"flops_profiler": {"enabled": True}}, NO_PROFILE | {"profile.modules": 2}),
        ({"flops_profiler": {"enabled": True, "profile_step": 4, "detailed": True}}, {"profile.modules": 5}),
        ({"flops_profiler": {"enabled": True, "profile_step": 99}}, NO_PROFILE),
        ({"wall_clock_breakdown": True}, NO_PROFILE | {"profile.synchronise": True}),
        ({"profile_backward": True}, NO_PROFILE | {"profile.synchronise": True}),
        ({}, WANDB),
        ({"use_wandb": False, "wandb_project": "p", "wandb_team": "t"}, WANDB),
        ({"wandb_group": "g"}, WANDB),
        ({"use_wandb": True}, WANDB | {"logging.wandb_project": "neox"}),
        (
            {
                "use_wandb": True,
                "wandb_project": "p",
                "wandb_team": "t",
                "wandb_group": "g",
                "wandb_run_name": "n",
                "wandb_host": "https://wandb.example",
                "wandb_init_all_ranks": True,
            },
            {
                "logging.wandb_project": "p",
                "logging.wandb_entity": "t",
                "logging.wandb_group": "g",
                "logging.wandb_name": "n",
                "logging.wandb_host": "https://wandb.example",
                "logging.wandb_all_ranks": True,
            },
        ),
    ],
)
def test_what_keys_become(translated, given, expected) -> None:
    values = flat(translated(**given))
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"save": "a", "load": "a"}, "load: is the run's own folder, from which it goes on by itself"),
        ({"finetune": True}, "finetune: used only with load"),
        ({"load": "b", "no_load_optim": True}, "no_load_optim: the weights alone are taken"),
        ({"wandb_group": "g"}, "use_wandb: not given, so W&B is off here"),
        ({"wandb_group": "g"}, "wandb_group: used only with use_wandb: true"),
        ({"use_wandb": False}, "use_wandb: W&B is not used"),
        ({"profile": True, "train_iters": 5}, "profile_step_start: 10 is beyond train_iters, so nothing is profiled"),
        ({"profile_step_stop": 5}, "profile_step_stop: used only with profile or memory_profiling"),
        ({"flops_profiler": {"enabled": True, "top_modules": 3}}, "flops_profiler: top_modules left out"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown: became profile.synchronise True"),
        ({"use_wandb": True, "wandb_group": "g"}, "wandb_group: became logging.wandb_group g"),
    ],
)
def test_what_is_said(translated, given, note) -> None:
    assert [line for line in notes(translated(**given)) if line.startswith(note)]


@pytest.mark.parametrize("factor", [1, 0, 0.5])
@pytest.mark.parametrize("compat", ["main", "v2.0"])
def test_a_log_scale_must_grow(translated, factor, compat) -> None:
    with pytest.raises(UserError, match=r"'checkpoint_factor' is .*, but on the log scale it must be above 1"):
        translated(checkpoint_scale="log", checkpoint_factor=factor, compat=compat)
