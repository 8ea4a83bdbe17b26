"""Layouts of a model on a machine: legal, fitting, ranked; machines from files; the command."""

from __future__ import annotations

import json

import pytest

from castalia.cli import main
from castalia.config import load
from castalia.errors import UserError
from castalia.tools.plan_certificate import small_config
from castalia.tools.plan_machine import machine_names, read_machine
from castalia.tools.plan_search import find_candidates
from castalia.tools.plan_text import bar

VALUES = {
    "data.seq_length": 64,
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.vocab_size": 512,
    "training.batch_size": 16,
    "training.micro_batch_size": 2,
    "training.steps": 3,
}


def test_every_machine_that_is_shipped_can_be_read():
    assert {"a100-40gb", "h100-80gb", "laptop-cpu"} <= set(machine_names())
    for name in machine_names():
        machine = read_machine(name)
        assert machine.exchange("gather", 8, 1, 1e9) < machine.exchange("all_reduce", 64, 1, 1e9)
    with pytest.raises(UserError, match="bf16"):
        read_machine("v100-32gb").rate("bf16")


def test_a_file_may_be_based_on_a_machine(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("base: a100-40gb\nname: ours\nlinks: {between: 1.25e10}\n")
    mine, theirs = read_machine(str(path)), read_machine("a100-40gb")
    assert mine.links.between == theirs.links.between / 2
    assert mine.links.within == theirs.links.within
    path.write_text("base: a100-40gb\nmemory: -1.0\n")
    with pytest.raises(UserError, match="memory"):
        read_machine(str(path))
    with pytest.raises(UserError, match="neither a file"):
        read_machine("pdp-11")


def test_idle_cores_help_the_others(tmp_path):
    path = tmp_path / "cpu.yml"
    path.write_text("base: laptop-cpu\ndevices_per_node: 4\n")
    machine = read_machine(str(path))
    assert machine.shared(1).rate("fp32") == 4 * machine.rate("fp32")
    assert machine.shared(8) == machine


@pytest.fixture(scope="module")
def found():
    return find_candidates(small_config(VALUES, {}), read_machine("h100-80gb"), 8)


def test_candidates_are_legal_fit_and_come_quickest_first(found):
    times = [candidate.time.total for candidate in found.ranked]
    assert times == sorted(times)
    assert len(times) > 50
    for candidate in found.ranked:
        assert candidate.layout.world == 8
        assert candidate.memory.total <= found.budget
    kinds = {
        name for c in found.ranked for name in ("zero", "tensor", "context", "pipeline") if getattr(c.layout, name) > 1
    }
    assert kinds == {"zero", "tensor", "context", "pipeline"}
    assert found.as_given is not None
    assert found.as_given.layout.data == 8


def test_the_illegal_are_grouped_by_their_reason(found):
    whys = " ".join(found.refused)
    assert "num_attention_heads N does not divide by parallel.tensor N" in whys
    assert "zero_bubble" in whys
    assert sum(found.refused.values()) > len(found.refused)


def test_what_is_fixed_stays():
    config = small_config(VALUES, {"tensor": 2}, ("performance.recompute=full",))
    keys = ("parallel.tensor", "performance.recompute", "training.micro_batch_size")
    for candidate in find_candidates(config, read_machine("h100-80gb"), 4, keys).ranked:
        assert candidate.layout.tensor == 2
        assert candidate.settings["performance.recompute"] == "full"
        assert candidate.config.micro_batch_size == 2


def test_memory_decides_what_is_recomputed_and_offloaded():
    config, machine = small_config(VALUES, {}), read_machine("h100-80gb")
    whole = find_candidates(config, machine, 1)
    tight = machine.model_copy(update={"memory": 0.6 * whole.ranked[0].memory.total / 0.9})
    words = {str(c.settings["performance.recompute"]) for c in find_candidates(config, tight, 1).ranked}
    assert "full" in words
    tiny = machine.model_copy(update={"memory": 1000.0})
    nothing = find_candidates(config, tiny, 1)
    assert nothing.ranked == []
    assert nothing.closest is not None


def test_the_command_writes_a_configuration_that_loads(tmp_path, capsys):
    run, out = tmp_path / "run.yml", tmp_path / "chosen.yml"
    tree: dict[str, dict] = {}
    for key, value in VALUES.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    run.write_text(json.dumps(tree))
    verb = ["plan", str(run), "--machine", "a100-40gb", "--devices", "2", "parallel.tensor=2"]
    assert main([*verb, "--choose", "2", "--write", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    chosen = answer["ranked"][1]["settings"]
    written = load([out])
    assert written.parallel.tensor == 2
    assert written.micro_batch_size == chosen["training.micro_batch_size"]
    assert written.parallel.zero == chosen["parallel.zero"]
    assert main(verb) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    for wrong in (["--choose", "9999"], ["--devices", "0"]):
        assert main([*verb, *wrong]) == 2
    assert main(["plan", str(run), "--choose", "1"]) == 2
    assert main(["plan"]) == 2


def test_bars():
    assert bar(0.0, 4) == "    "
    assert bar(0.5, 4) == "██  "
    assert bar(2.0, 2) == "██"
