"""The picture of one run in several layouts: it stands alone, shows all curves, and refuses what differs."""

from xml.etree import ElementTree

import pytest

from castalia.errors import CheckFailed
from castalia.tools.curves import ONE, RUNS, differences, draw


@pytest.fixture
def curves():
    steps = range(1, 21)
    off = dict(zip(RUNS, (0, 3e-7, 1e-7, 2e-7, 4e-8), strict=True))
    return {label: {step: 8 - 0.1 * step + off[label] * (step % 3) for step in steps} for label in RUNS}


def test_the_picture_stands_alone_and_shows_every_run(curves):
    text = draw(curves)
    assert "var(" not in text and 'class="curve' in text
    drawn = ElementTree.fromstring(text)
    paths = drawn.findall(".//{*}g[@class='curve line']")
    assert len(paths) == 5 + 4
    colours = [path.get("color") for path in paths]
    assert len(set(colours)) == 5 and colours[1:5] == colours[5:]  # the same run has the same colour in both panels
    widths = [path[0].get("style") for path in paths[:5]]
    assert len(set(widths)) == 5  # on top of each other, and all are seen


def test_differences_are_to_one_process(curves):
    found = differences(curves)
    assert list(found) == [label for label in RUNS if label != ONE]
    assert max(found["ZeRO 3 on 2"].values()) == pytest.approx(6e-7, rel=1e-3)


def test_a_run_that_is_off_or_shorter_fails(curves):
    curves["pipeline of 2"][7] += 1e-3
    with pytest.raises(CheckFailed, match="pipeline of 2: off by 1.0e-03"):
        draw(curves)
    del curves["ZeRO 3 on 2"][20]
    with pytest.raises(CheckFailed, match="ZeRO 3 on 2: has 19 steps"):
        draw(curves)
