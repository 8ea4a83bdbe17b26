"""Ticks, thinning and drawing, by the properties that a reader of a chart relies on."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.tools.plots import (
    Series,
    chart,
    downsample,
    format_number,
    log_ticks,
    nice_ticks,
    script_json,
    smooth,
    tick_labels,
)

values = st.floats(1e-9, 1e12)


@given(values, values)
def test_linear_ticks_are_round_inside_and_neither_few_nor_many(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if high <= low * (1 + 1e-6):
        return
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    slack = (high - low) * 1e-6
    assert all(low - slack <= t <= high + slack for t in ticks)
    step = ticks[1] - ticks[0]
    mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


@given(values, st.floats(1.2, 1e12))
def test_log_ticks_are_inside_and_not_too_many(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)


def test_numbers_for_people() -> None:
    cases = {0: "0", 1.5: "1.5", 999.6: "1,000", 1234: "1,234", 9999.9: "10k", 12345: "12.3k", 999999: "1M"}
    cases |= {4_770_304: "4.77M", 1.5e9: "1.5B", 0.0006: "6e-4", 1.234e-5: "1.23e-5", -0.25: "-0.25"}
    assert {v: format_number(v) for v in cases} == cases
    assert format_number(math.nan) == "\u2013"
    assert tick_labels([0, 2.5e-4, 5e-4, 1e-3]) == ["0", "2.5e-4", "5e-4", "1e-3"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]


def test_downsampling_keeps_ends_and_every_spike() -> None:
    x = list(range(10_000))
    y = [math.sin(i / 500) for i in x]
    y[1234], y[7777] = 50.0, -50.0
    thin_x, thin_y = downsample(x, y, 100)
    assert len(thin_x) <= 202 and thin_x == sorted(thin_x)
    assert (thin_x[0], thin_x[-1]) == (0, 9999)
    assert {(1234, 50.0), (7777, -50.0)} <= set(zip(thin_x, thin_y, strict=True))
    assert downsample([1, 2], [3, 4], 1) == ([1, 2], [3, 4])


def test_smoothing_averages_and_ignores_what_is_not_finite() -> None:
    y = [5.0, 1.0, 1.0, 1.0, 2.0, 4.0, math.nan, 6.0, 8.0, 8.0, 8.0]
    out = smooth(y, 1)
    assert out[:4] == y[:4]  # narrow at the start
    assert out[4] == pytest.approx(7 / 3)
    assert math.isnan(out[6]) and out[5] == pytest.approx(3) and out[7] == pytest.approx(7)
    assert out[-1] == 8


def figure(*args: object, **options: object) -> tuple[ElementTree.Element, dict]:
    page = chart(*args, **options)  # type: ignore[arg-type]
    svg = re.search(r"<svg.*</svg>", page, re.S)
    data = re.search(r'<script type="application/json">(.*)</script>', page, re.S)
    assert svg and data
    return ElementTree.fromstring(svg[0]), json.loads(data[1])


def test_points_are_where_the_axes_say() -> None:
    svg, data = figure("t", [Series("a", [0, 5, 10], [1.0, 2.0, 3.0], style="marked")], "step")
    left, right, top, bottom = data["box"]
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in svg.iter("circle")]
    assert [c[0] for c in circles] == [left, (left + right) / 2, right]
    assert top < circles[2][1] < circles[1][1] < circles[0][1] < bottom
    assert circles[0][1] - circles[1][1] == pytest.approx(circles[1][1] - circles[2][1], abs=0.2)


def test_equal_factors_are_equal_distances_on_a_log_axis() -> None:
    svg, _ = figure("t", [Series("a", [0, 1, 2], [1, 10, 100], style="marked")], "step", log_y=True)
    y = [float(c.get("cy", 0)) for c in svg.iter("circle")]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


def test_what_is_not_finite_breaks_the_curve_and_stays_out_of_the_data() -> None:
    y = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0]
    svg, data = figure("t", [Series("a", list(range(7)), y)], "step")
    (path,) = svg.iter("path")
    assert (path.get("d") or "").count("M") == 3
    assert data["series"][0]["y"] == [1, 2, 3, 4, 5]
    assert len(list(svg.iter("circle"))) == 1  # a point without neighbours is marked


def test_degenerate_curves() -> None:
    assert chart("t", [Series("a", [], [])], "step") == ""
    assert chart("t", [Series("a", [1], [-1.0])], "step", log_y=True) == ""
    for y in (0.0, 5.0):
        figure("t", [Series("a", [3], [y])], "step")
        figure("t", [Series("a", [1, 2], [y, y])], "step", zero=True)
    figure("t", [Series("a", [1, 2], [5, 5])], "step", log_y=True)


def test_names_cannot_break_out() -> None:
    evil = "</script><script>alert(1)</script>"
    page = chart(evil, [Series(evil, [0, 1], [1, 2]), Series("b", [0, 1], [1, 2])], evil, evil)
    assert "<script>alert" not in page and page.count("</script>") == 1
    assert json.loads(script_json({"a": evil})) == {"a": evil}
