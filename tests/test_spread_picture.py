"""The heat map of spread: every cell's shade, marks, escaping, and what the report's page would refuse."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_hex

from atp_rl.tracking.spread_picture import COLORS, UNMEASURED, spread_heatmap

NAN = float("nan")
RATES = [[1.0, 0.0, 0.1], [1.0, 0.5, NAN]]  # two checkpoints of three seats
SEATS = ["seat_1", "seat_2", "seat_3"]
SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: str) -> ET.Element:
    """As a browser reads it: inside HTML both namespaces are known."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return ET.fromstring(str(picture).replace("<svg ", f"<svg {names} ", 1))


def texts(picture: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in parsed(picture).iter(f"{SVG}text")]


def shades(picture: str, mesh: int = 1) -> list[str]:
    """Colours of the cells in their order: seat by seat, the checkpoints of each."""
    groups = [node for node in parsed(picture).iter(f"{SVG}g") if node.get("id", "").endswith(f"QuadMesh_{mesh}")]
    return re.findall(r"fill: (#[0-9a-f]{6})", ET.tostring(groups[0], "unicode"))


def test_cells_are_seats_by_checkpoints():
    rates = [[0.02, 0.52], [0.32, 0.72], [0.98, 0.12]]
    expected = [to_hex(COLORS(v)) for v in (0.02, 0.32, 0.98, 0.52, 0.72, 0.12)]
    assert shades(spread_heatmap(rates, [0, 10, 40], ["a", "b"])) == expected


def test_shades_darken_steadily_so_that_no_colour_vision_is_needed():
    red, green, blue = np.array([COLORS(v)[:3] for v in np.linspace(0, 1, 20)]).T
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    assert (np.diff(luminance) < 0).all()
    assert luminance[0] > 0.85
    assert luminance[-1] < 0.1


def test_what_was_not_measured_is_marked_and_named():
    picture = spread_heatmap(RATES, [0, 10], SEATS)
    assert UNMEASURED in picture
    assert "not measured" in texts(picture)
    assert len([cell for cell in shades(picture) if cell in {to_hex(COLORS(v)) for v in (0.0, 0.1, 0.5, 1.0)}]) == 5
    complete = spread_heatmap([[1, 0, 0.1]], [0], SEATS)
    assert UNMEASURED not in complete
    assert "not measured" not in complete


def test_deviants_are_marked_and_named():
    picture = spread_heatmap(RATES, [0, 10], SEATS, deviants=["seat_1"])
    assert {"◆ seat_1", "seat_2", "seat_3", "deviant seat"} <= set(texts(picture))
    assert "seat_1 (deviant) 100.0 %" in picture
    assert "deviant" not in spread_heatmap(RATES, [0, 10], SEATS)


def test_axes_and_scale_have_names_and_the_title_says_what_is_seen():
    picture = spread_heatmap(RATES, [0, 10], SEATS)
    assert {"step", "seat", "violation rate", "0%", "100%", "0", "10"} <= set(texts(picture))
    ends = "seat_1 100.0 % and 100.0 %, seat_2 0.0 % and 50.0 %, seat_3 10.0 % and not measured"
    assert f"<title>Violation rate by seat at 2 checkpoints, at steps 0 and 10: {ends}</title>" in picture


def test_names_are_escaped_and_long_ones_cut():
    nasty = ["<script>alert(1)</script>", '"></svg><b>&', "$x$ & 'y'", "n" * 60]
    picture = spread_heatmap(np.zeros((1, 4)), [0], nasty, deviants=nasty[:1])
    assert "<script" not in picture
    assert "<b>" not in picture
    assert {"◆ <script>alert(1)</scrip…", nasty[1], nasty[2], "n" * 23 + "…"} <= set(texts(picture))
    assert len(list(parsed(picture).iter(f"{SVG}svg"))) == 1


def test_the_page_needs_nothing_else():
    many = spread_heatmap(np.random.default_rng(0).random((70, 12)), range(70), [f"seat_{i}" for i in range(12)])
    for picture in (many, spread_heatmap(RATES, [0, 10], SEATS)):
        assert not re.search(r"<image|<script|<style|data:|@import|https?:", picture)
    ticks = [t for t in texts(many) if t.isdigit()]
    assert ticks == [str(step) for step in range(0, 70, 6)]  # of many checkpoints at most 12 are labelled


def test_equal_input_gives_equal_bytes_and_pictures_share_no_ids():
    one, other = (spread_heatmap(RATES, [0, 10], names) for names in (SEATS, ["a", "b", "c"]))
    assert one == spread_heatmap(RATES, [0, 10], SEATS)
    ids = [set(re.findall(r'\bid="([^"]+)"', picture)) for picture in (one, other)]
    assert not ids[0] & ids[1]
    for picture, known in zip((one, other), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", picture)) | set(re.findall(r'href="#([^"]+)"', picture)) <= known


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ([[0.0]], "must be"),
        (np.zeros((0, 3)), "must be"),
        ([[0, 0, 1.5], [0, 0, 0]], "lie in"),
        ([[0, 0, 50]] * 2, "lie"),
    ],
)
def test_bad_rates_are_errors(rates, match):
    with pytest.raises(ValueError, match=match):
        spread_heatmap(rates, [0, 10], SEATS)
