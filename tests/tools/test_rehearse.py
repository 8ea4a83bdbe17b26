"""A rehearsal must count what real processes exchange, and say what a big job cannot do before there is one."""

import json
from pathlib import Path
from typing import Any

import pytest

from castalia.cli import main
from castalia.config import Config, load
from castalia.config.derive import derive
from castalia.errors import UserError
from castalia.parallel.layout import Layout, layout_of
from castalia.parallel.rehearsal import Counted, Exchange
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World
from castalia.tools.rehearse import default_ranks, group_name, rehearse, traced_sizes
from castalia.tools.verify import InventedText, with_settings

VALUES = {
    "version": 1,
    "data": {"seq_length": 16},
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64},
    "training": {"steps": 2, "batch_size": 8, "micro_batch_size": 1, "precision": "bf16"},
}
# Eight micro-batches, or four where there are two data-parallel ranks: more than are traced.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"zero": 2},
        {"tensor": 2, "model.position": "alibi"},
        {"context": 2},
        {"pipeline": 2, "schedule": "interleaved", "model.num_layers": 4},
    ],
    4: [
        {"zero": 3, "shard": 2},
        {"zero": 1, "pipeline": 2},
        {"tensor": 2, "sequence": True, "pipeline": 2},
    ],
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "run.yml"
    path.write_text(json.dumps(VALUES), encoding="utf-8")
    return derive(load([path]))[0]


def really(world: World, config: Config, layouts: list[dict[str, Any]]) -> list[dict[Exchange, tuple[int, int]]]:
    """In each process: what the second step of each layout exchanged."""
    from castalia.data.loader import Loader, Shard
    from castalia.data.plan import RunPlan
    from castalia.parallel.mesh import Mesh
    from castalia.train.assemble import assemble

    found = []
    for settings in layouts:
        here = with_settings(config, settings)
        mesh = Mesh(layout_of(here.parallel, world.size), world)
        parts = assemble(here, mesh)
        plan, shard = RunPlan(8, 16, 2), Shard(mesh.data_rank, mesh.layout.data)
        loader = Loader(InventedText(16, 64), plan, shard, 1, 0)  # type: ignore[arg-type]
        for step in range(2):
            with Counted() as counted:
                batches = loader.batch(plan.at(step))
                parts.engine.forward_backward(batches, parts.count(sum(b.num_tokens for b in batches)), step)
                parts.store.gradient_norm()
                parts.store.step(1e-3)
        found.append({exchange: (t.operations, t.bytes) for exchange, t in counted.traffic.items()})
    return found


@pytest.mark.parametrize("processes", LAYOUTS)
def test_counts_are_those_of_real_processes(config: Config, processes: int) -> None:
    layouts = LAYOUTS[processes]
    real = run_in_processes(processes, really, config, layouts, timeout=120)
    for number, settings in enumerate(layouts):
        rank = (number + 1) % processes
        _, (rehearsed,) = rehearse(with_settings(config, settings), processes, [rank])
        counted = {exchange: (t.operations, t.bytes) for exchange, t in rehearsed.traffic.items()}
        assert counted == real[rank][number], (settings, rank)


def test_memory_between_steps_is_that_of_the_shards(config: Config) -> None:
    spread = with_settings(config, {"zero": 1, "training.precision": "fp32"})
    _, (whole,) = rehearse(with_settings(config, {"training.precision": "fp32"}), 2, [0])
    _, (first, last) = rehearse(spread, 4, [0, 3])
    assert whole.state_bytes >= 12 * whole.parameters  # weights and two moments in fp32, and the gradients' arena
    assert first.parameters + last.parameters < whole.parameters
    assert first.peak_bytes > first.state_bytes


def test_what_a_big_job_cannot_do_is_said_with_its_rank(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="does not divide 1000 processes"):
        rehearse(with_settings(config, {"tensor": 3}), 1000)
    with pytest.raises(UserError, match="none of the ranks"):
        rehearse(config, 4, [4])
    with pytest.raises(UserError, match="router"):
        rehearse(with_settings(config, {"model.moe_num_experts": 4}), 4)

    def refuse(*_: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr("castalia.tools.rehearse.assemble", refuse)
    with pytest.raises(UserError, match=r"^rank 3 of 4 \(replicate 1 of 2, tensor 1 of 2\): no$"):
        rehearse(with_settings(config, {"tensor": 2}), 4, [3])


def test_ranks_and_groups_have_names() -> None:
    layout = Layout(pipeline=4, shard=2, tensor=2, zero=1)
    assert default_ranks(layout) == [0, 4, 8, 12, 15]
    assert group_name(layout, [0, 1]) == "tensor"
    assert group_name(layout, [0, 2]) == "data"
    assert group_name(layout, [0, 4, 8, 12]) == "pipeline"
    assert group_name(layout, [0, 12]) == "ends of the pipeline"
    assert group_name(layout, range(16)) == "all"


def test_few_micro_batches_are_traced_whole(config: Config) -> None:
    layout = Layout(pipeline=4)
    deep = with_settings(config, {"pipeline": 4})
    assert traced_sizes(deep, layout, 4) == [4]
    assert traced_sizes(deep, layout, 32) == [4, 5]
    assert traced_sizes(with_settings(config, {"pipeline": 4, "schedule": "interleaved"}), layout, 32) == [4, 8]


def test_command_line(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run.yml")
    assert main(["plan", path, "parallel.tensor=2", "--rehearse", "--world", "4", "--ranks", "1", "--json"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["rank"] == 1
    assert {row["group"] for row in rank["collectives"]} >= {"tensor", "data"}
    assert main(["plan", path, "--rehearse", "--world", "2", "--ranks", "0"]) == 0
    assert "all-reduce" in capsys.readouterr().out
    for flags in (["--rehearse"], ["--world", "4"], ["--rehearse", "--world", "1"], ["--mtbf", "1h"]):
        assert main(["plan", path, *flags]) == 2
        assert "--" in capsys.readouterr().err
