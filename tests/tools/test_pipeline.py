"""Schedules drawn from torch's own must wait as long as the textbooks say, and do everything once."""

import json
from pathlib import Path

import pytest

from castalia.cli import main
from castalia.errors import UserError
from castalia.parallel.stages import SCHEDULES
from castalia.parallel.timeline import OTHERS, Costs, actions, timeline
from castalia.tools.pipeline import drawing, lines, page


@pytest.mark.parametrize("schedule", [*SCHEDULES, *OTHERS])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8)])
def test_everything_is_done_once_and_after_what_it_needs(schedule: str, ranks: int, micro_batches: int) -> None:
    line = timeline(schedule, ranks, micro_batches, costs=Costs(1, 1.5, 0.75, 0.25))
    ends = {(b.kind, b.stage, b.micro_batch): b for row in line.blocks for b in row}
    assert sum(map(len, line.blocks)) == len(ends)
    for stage in range(line.stages):
        for number in range(micro_batches):
            forward = ends["F", stage, number]
            whole = ends.get(("B", stage, number))
            back = whole or ends["I", stage, number]
            assert (whole is None) == (("W", stage, number) in ends)
            assert forward.end <= back.start
            if stage:
                assert ends["F", stage - 1, number].end <= forward.start
                before = ends.get(("B", stage - 1, number)) or ends["I", stage - 1, number]
                assert back.end <= before.start
    for row in line.blocks:
        assert all(a.end <= b.start for a, b in zip(row, row[1:], strict=False))
    assert sum(b.end - b.start for row in line.blocks for b in row) == pytest.approx(ranks * micro_batches * 3.25)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (3, 9)])
def test_bubbles_are_those_of_the_textbooks(p: int, m: int) -> None:
    for schedule in ("gpipe", "1f1b"):  # whatever the passes cost (Huang et al. 2019; Narayanan et al. 2019)
        for costs in (Costs(), Costs(1, 0.5, 2)):
            assert timeline(schedule, p, m, costs=costs).bubble == pytest.approx((p - 1) / (m + p - 1))
    if m % p == 0:  # Narayanan et al. 2021: v stages on a rank make the bubble v times smaller
        for v in (2, 3):
            assert timeline("interleaved", p, m, v).bubble == pytest.approx((p - 1) / (v * m + p - 1))


def test_peaks_and_the_gain_of_a_zero_bubble() -> None:
    assert timeline("gpipe", 4, 8).peaks == [8, 8, 8, 8]
    assert timeline("1f1b", 4, 8).peaks == [4, 3, 2, 1]
    assert timeline("1f1b", 4, 32).peaks == [4, 3, 2, 1]  # however many micro-batches
    assert timeline("zero_bubble", 4, 8).bubble < timeline("interleaved", 4, 8).bubble < timeline("1f1b", 4, 8).bubble
    assert timeline("1f1b", 4, 8, costs=Costs(send=0.5)).bubble > timeline("1f1b", 4, 8).bubble


def test_the_order_is_the_one_that_torch_executes() -> None:
    last = actions("1f1b", 2, 3)[1]
    assert last == [(kind, 1, number) for number in range(3) for kind in "FB"]


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "per_rank", "message"),
    [
        ("1f1c", 4, 8, None, "known are gpipe"),
        ("1f1b", 1, 8, None, "at least 2"),
        ("1f1b", 4, 8, 2, "one stage"),
        ("interleaved", 4, 8, 1, "several stages"),
        ("zbv", 4, 8, 3, "two stages"),
        ("1f1b", 4, 2, None, "1f1b with 4 ranks and 2 micro-batches"),
    ],
)
def test_what_torch_cannot_do_is_refused(
    schedule: str, ranks: int, micro_batches: int, per_rank: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        timeline(schedule, ranks, micro_batches, per_rank)


def test_drawings() -> None:
    line = timeline("1f1b", 2, 2)
    text = lines(line)
    assert text[2].startswith("rank 0   F0 F1 .  .  B0 -  .  B1 -  waits 33.3%, holds 2")
    picture = drawing([line, timeline("zero_bubble", 2, 4)])
    assert picture.startswith("<svg") and picture.count("<title>") == 4 * 2 + 3 * 4 * 4
    assert picture in page([line, timeline("zero_bubble", 2, 4)])
    assert max(map(len, lines(timeline("interleaved", 8, 64)))) < 200


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.svg"
    flags = ["--schedule", "1f1b,gpipe", "--stages", "2", "--microbatches", "4", "--costs", "1,1,1"]
    assert main(["pipeline", *flags, "--output", str(out), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)["schedules"]
    assert [found["bubble"] for found in both] == pytest.approx([0.2, 0.2])
    assert out.read_text(encoding="utf-8").startswith("<svg")
    for bad in (["--costs", "1,2"], ["--output", "a.png"], ["--schedule", "none"]):
        assert main(["pipeline", *bad]) == 2
        assert "--" in capsys.readouterr().err
