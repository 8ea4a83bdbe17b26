"""Looking at a run that trains: files appear, the record has its phases, and no weight is another one."""

from __future__ import annotations

import json
import os

import pytest
import torch

from castalia.cli import main
from castalia.config import Config
from castalia.config.derive import derive
from castalia.errors import UserError
from castalia.model.size import model_size
from castalia.parallel.testing import run_in_processes
from castalia.train.loop import Stopped
from castalia.train.metrics import read_metrics, recomputed
from castalia.train.profile_timers import Clock, Timers
from castalia.train.run import Run, train
from castalia.train.sinks import scalars


def run_of(values, **settings):
    return Config.model_validate(values | {"profile": settings})


def test_looking_changes_nothing_and_leaves_whole_files(tiny_values, tmp_path, capsys):
    plain = train(Config.model_validate(tiny_values), quiet=True).store.tensors()
    values = tiny_values | {"output": str(tmp_path / "other")}
    run = train(run_of(values, start=3, stop=4, memory=True, modules=6, synchronise=True))
    assert all(torch.equal(plain[n], t) for n, t in run.store.tensors().items())
    assert sorted(p.name for p in (run.directory / "profile").iterdir()) == [
        "modules-step-6-rank-0.json",
        "modules-step-6-rank-0.txt",
        "steps-3-4-rank-0.memory.json",
        "steps-3-4-rank-0.pt.trace.json",
    ]
    said = capsys.readouterr().err
    trace = json.loads((run.directory / "profile/steps-3-4-rank-0.pt.trace.json").read_text())
    ranges = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert ranges.count("step 3") == ranges.count("step 4") == 1 and not any("step 5" in name for name in ranges)
    assert ranges.count("forward") == ranges.count("backward") == 4 and ranges.count("optimizer") == 2
    memory = json.loads((run.directory / "profile/steps-3-4-rank-0.memory.json").read_text())
    assert memory["peak_bytes"] == max(held for _, held in memory["points"]) > 4 * 32 * 4 * 128
    assert {"step 3", "step 4", "forward"} <= {name for name, *_ in memory["ranges"]}
    modules = json.loads((run.directory / "profile/modules-step-6-rank-0.json").read_text())
    root = modules["root"]
    assert root["parameters"] == run.size.total_parameters and root["seconds"]["backward"] > 0
    assert root["kept_bytes"] > 0 and root["calls"] == modules["micro_batches"] == 2
    assert modules["tokens"] == 8 * 32 and modules["step_seconds"] >= sum(root["seconds"].values())
    written = run.directory / "profile/modules-step-6-rank-0.json"
    assert main(["profile", str(written), "--depth", "2", "--html", str(tmp_path / "p.html")]) == 0
    assert "the tokens of step 6: 8 sequences" in capsys.readouterr().out and (tmp_path / "p.html").is_file()
    assert main(["profile", str(written), "--trace", str(tmp_path / "t")]) == 2
    assert "time (ms)  data" in said and "modules-step-6-rank-0.json" in said and "attention_norm" in said


def test_every_record_has_its_phases(tiny_values):
    values = tiny_values | {"logging": {"interval": 4}}
    run = train(Config.model_validate(values), quiet=True)
    records = read_metrics(run.directory / "metrics.jsonl")
    timers = [r for r in records if r["kind"] == "timers"]
    assert [r["step"] for r in timers] == [4, 8, 12, 12]
    often = {"data", "forward", "backward", "reduce", "clip", "optimizer"}
    assert timers[0]["seconds"].keys() == often
    assert timers[1]["seconds"].keys() == often | {"saving", "validation"}  # of steps 4 and 6
    assert "saving" in timers[3]["seconds"] and not often & timers[3]["seconds"].keys()
    record = next(r for r in records if r["kind"] == "train")
    for first, second in zip(timers[:3], [r for r in records if r["kind"] == "train"], strict=True):
        # What is no phase (records, agreeing) is little; validation and saving are once in a while.
        inside = sum(seconds for name, seconds in first["seconds"].items() if name in often)
        assert 0 < inside <= 1.01 * second["step_seconds"]
    assert record["samples_per_second"] == pytest.approx(8 / record["step_seconds"])
    assert record["tokens_per_second"] == pytest.approx(32 * record["samples_per_second"])
    assert record["flops_per_second"] == pytest.approx(record["mfu"] * 1e11) and record["hfu"] == record["mfu"]
    names = scalars(timers[1])
    assert {"timers/forward", "timers/batch generator", "timers/backward-allreduce", "timers/validation"} <= set(names)
    assert names["timers/backward-clip-grad"] == timers[1]["seconds"]["clip"]
    assert scalars(record)["runtime/steps_per_sec"] == pytest.approx(1 / record["step_seconds"])
    assert {"runtime/samples_per_sec", "runtime/iteration_time", "runtime/hardware_flops_utilization"} <= set(
        scalars(record)
    )


def test_a_window_that_a_stop_cuts_short_is_written(tiny_values, capsys):
    values = tiny_values | {"training": tiny_values["training"] | {"exit_interval": 4}}
    with pytest.raises(Stopped), Run(run_of(values, start=3, stop=9), quiet=True) as run:
        run.train()
    assert [p.name for p in (run.directory / "profile").iterdir()] == ["steps-3-4-rank-0.pt.trace.json"]
    with pytest.raises(Stopped):
        train(run_of(values, start=3, stop=4, modules=2))
    said = capsys.readouterr().err
    assert (
        "profile.start: the run goes on from step 4, so step 4 is not seen" in said and "profile.modules: the" in said
    )


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"start": 30}, {}, "profile.start 30 comes after the last step, 12"),
        ({"start": 2, "ranks": [0, 4]}, {}, "names process 4, and there are 1"),
        ({"modules": 12}, {}, "profile.modules 12 is the last step"),
        ({"modules": 3}, {"performance": {"compile": True}}, "set performance.compile=false"),
    ],
)
def test_what_cannot_be_seen_is_refused(settings, more, message, tiny_values):
    with pytest.raises(UserError, match=message):
        Run(run_of(tiny_values | more, **settings), quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": 3}, "profile.stop is of use with profile.start"),
        ({"start": 3, "stop": 2}, "comes before profile.start 3"),
        ({"start": 3, "trace": False}, "neither trace nor memory"),
        ({"memory": True}, "profile.memory is of use with profile.start"),
        ({"ranks": []}, "profile.ranks"),
    ],
)
def test_settings_that_contradict_each_other(settings, message, tiny_values):
    with pytest.raises(ValueError, match=message):
        run_of(tiny_values, **settings)


class Event:
    """A device's event that is reached when the test says so; the device runs one second a record."""

    made = 0

    def __init__(self, device, enable_timing):
        assert device == "meta" and enable_timing

    def record(self):
        Event.made += 1
        self.at, self.done = Event.made, False

    def query(self):
        return self.done

    def synchronize(self):
        assert self.done, "nobody waits for the device"

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_on_an_accelerator_events_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch, "Event", Event)
    timers = Timers(torch.device("meta"))
    with timers("forward"):
        pass
    assert timers.take() == {}
    for _, start, end in timers._spans:
        start.done = end.done = True
    with timers("optimizer"):
        pass
    assert timers.take(2) == {"forward": 0.5} and len(timers._spans) == 1


def test_synchronising_waits_at_both_ends(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(1))
    with Timers(torch.device("meta"), synchronise=True)("forward"):
        assert waited == [1]
    assert waited == [1, 1]
    Clock(torch.device("cpu"), synchronise=True).now()
    assert waited == [1, 1]


def test_waiting_for_the_next_item_is_a_phase():
    timers = Timers()
    assert list(timers.each("data", [1, 2])) == [1, 2]
    assert len(timers._spans) == 2  # not the end


def test_recomputing_adds_the_layers_forward_pass(tiny_values):
    config, _ = derive(Config.model_validate(tiny_values | {"performance": {"recompute": "full"}}), 384)
    size = model_size(config)
    heads = 6 * 384 * 32
    assert recomputed(config, size) == pytest.approx((1 - heads / size.flops_per_token) / 3)


def profiled(world, values):
    """What the run's folder has where this process ends."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # joined already, but asked for
    run = train(Config.model_validate(values), quiet=True)
    return sorted(p.name for p in (run.directory / "profile").iterdir())


def test_ranks_are_chosen_and_every_layout_has_phases(tiny_values):
    settings = {"start": 2, "stop": 3, "ranks": [1], "modules": 5}
    values = tiny_values | {"profile": settings, "parallel": {"zero": 1}}
    *_, names = run_in_processes(2, profiled, values)
    assert names == [
        "modules-step-5-rank-1.json",
        "modules-step-5-rank-1.txt",
        "steps-2-3-rank-1.pt.trace.json",
    ]
