"""Real GPT-NeoX runs, repeated: their YAML keys, their data, their step-0 weights, their 30 losses.

The whole of Castalia's own path is used (translation, data order, import, engine, schedule,
store); only the first weights are theirs. What must come out is in tests/fixtures/gptneox_runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.config import load
from castalia.convert.gptneox import load_gptneox_checkpoint
from castalia.train.metrics import read_metrics
from castalia.train.run import Run

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptneox_runs"


class Repeated:
    """A fixture run, trained again by Castalia."""

    def __init__(self, name: str, folder: Path, *overrides: str, **changes: object) -> None:
        self.record = json.loads((FIXTURES / f"{name}.json").read_text())
        keys = self.record["config"] | {
            "data-path": str(FIXTURES / self.record["data_path"]),
            "vocab-file": str(FIXTURES / self.record["vocab_file"]),
            "save": str(folder / "run"),
        }
        # Spread over two devices there; one does here. 128 x 2 and 128 both round its 500 ids up to 512.
        keys |= {"model_parallel_size": 1, "global_num_gpus": 1} if name == "tp2_std" else {}
        source = folder / f"{name}.yml"
        source.write_text(json.dumps(keys | changes))
        self.save = FIXTURES / f"ckpt_{name}"
        begin = [f"start.path={self.save}", "start.step=0", "start.optimizer=false"]
        self.config = load([source], ["performance.threads=1", "performance.peak_flops=1e11", *begin, *overrides])

    def begin(self) -> Run:
        """The run, assembled, with GPT-NeoX's step-0 weights."""
        return Run(self.config, quiet=True).__enter__()


@pytest.fixture(scope="module", params=["seq_gptj", "pp1_gptj", "tp2_std"])
def repeated(request, tmp_path_factory):
    case = Repeated(request.param, tmp_path_factory.mktemp(request.param))
    run = case.begin()
    run.train()
    run.__exit__(None, None, None)
    case.run, case.metrics = run, read_metrics(run.directory / "metrics.jsonl")
    return case


@torch.no_grad()
def _logits(run):
    tokens = torch.from_numpy(np.random.RandomState(5).randint(0, 500, (2, 64)))
    return run.model.logits(run.model(tokens))


def test_what_the_run_began_from_is_recorded(repeated):
    event = next(r for r in repeated.metrics if r.get("event") == "import")
    assert event["step"] == 0 and str(repeated.save) in event["text"] and "weights alone" in event["text"]


def test_thirty_losses(repeated):
    losses = [r["loss"] for r in repeated.metrics if r["kind"] == "train"]
    differences = np.abs(np.array(losses) - repeated.record["train_loss_per_iteration"])
    assert len(losses) == 30 and differences.max() < 2e-6


def test_validation_losses(repeated):
    """GPT-NeoX goes on through the validation set from one evaluation to the next; so does a translated run."""
    expected = repeated.record["validation_loss"]
    found = {str(r["step"]): r["loss"] for r in repeated.metrics if r["kind"] == "valid"}
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=2e-6), step


def test_final_weights_and_moments(repeated):
    theirs = load_gptneox_checkpoint(repeated.save, repeated.run.config.model, step=30)
    mine = repeated.run.store.tensors()
    heads = repeated.run.config.model.num_attention_heads
    for name, value in theirs.weights.items():
        difference = mine[f"model.{name}"] - value
        if name.endswith("qkv.bias"):
            # A softmax does not feel a key's bias, so its gradient is rounding, which Adam divides by its own size:
            # it walks at random, by at most the learning rate of 3e-3 a step. Each head is query, key, value.
            assert difference.view(heads, 3, -1)[:, 1].abs().max() < 1e-2, name
            difference = difference.view(heads, 3, -1)[:, ::2]
        assert difference.norm() < 5e-5 * value.norm(), name
    assert theirs.optimizer is not None
    for name, state in theirs.optimizer.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            difference = (mine[f"optimizer.{name}.{moment}"] - state[moment]).norm()
            assert difference < 5e-5 * state[moment].norm(), (name, moment)


def test_logits(repeated):
    """Of the weights that GPT-NeoX saved at the end (there are none for pp1_gptj)."""
    references = sorted(FIXTURES.glob(f"logits_{repeated.record['name']}_r*.npy"))
    if repeated.record["name"] == "pp1_gptj":
        assert not references
        return
    # Each tensor-parallel rank has its slice of the vocabulary.
    expected = torch.cat([torch.from_numpy(np.load(path)).float() for path in references], dim=-1)
    assert expected.shape[-1] == repeated.config.model.vocab_multiple * 4
    theirs = load_gptneox_checkpoint(repeated.save, repeated.run.config.model, step=30)
    repeated.run.model.load_state_dict(theirs.weights)
    found = _logits(repeated.run).view(expected.shape)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5
