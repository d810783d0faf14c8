"""Heat maps: what PIL reads back from the PNG, and a page that needs nothing else."""

import base64
import io
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_svd.report.heat_map import FLOOR, HeatMap, color, heat_map_page, png

BYTES = st.integers(0, 255)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.tuples(*[BYTES] * 4), min_size=n, max_size=n), min_size=1))
)
def test_a_png_reads_back_as_the_pixels_it_was_made_of(pixels):
    image = Image.open(io.BytesIO(png(pixels)))
    assert (image.mode, image.size) == ("RGBA", (len(pixels[0]), len(pixels)))
    assert [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)] == pixels


def test_the_scale_is_logarithmic_from_its_floor_to_one():
    assert color(FLOOR) == color(0.0) == (68, 1, 84, 255)
    assert color(1.0) == color(3.0) == (253, 231, 37, 255)
    assert color(math.sqrt(FLOOR)) == (33, 145, 140, 255)  # half-way
    assert color(None) == (0, 0, 0, 0)


def luminance(share):
    red, green, blue, _ = color(share)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@given(st.floats(FLOOR, 1.0), st.floats(FLOOR, 1.0))
def test_more_is_lighter(a, b):
    # A step of each of the three colors is at most 1 of 255 off by rounding.
    assert a > b or luminance(a) <= luminance(b) + 1.0


def test_a_page_shows_each_map_with_its_axes_and_nothing_from_elsewhere():
    rows = [[1.0, 0.5], [0.25, None], [0.1, None]]
    maps = [HeatMap(title, "epoch", [0, 30], "index", [1, 5, 9], rows) for title in ("fc", "<b>")]
    page = heat_map_page("s & s", maps)
    images = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(images) == 2 and images[0] == images[1]
    image = Image.open(io.BytesIO(base64.b64decode(images[0])))
    assert [[image.getpixel((x, y)) for x in (0, 1)] for y in (0, 1, 2)] == [[color(v) for v in row] for row in rows]
    assert "&lt;b&gt;" in page and "<b>" not in page and "s &amp; s" in page
    for text in ("<span>0</span>", "<span>30</span>", "<span>1</span>", "<span>9</span>", ">epoch<", ">index<"):
        assert page.count(text) == 2
    assert not re.search(r"<script|<link|https?:", page)


@pytest.mark.parametrize("share", [math.nan])
def test_a_share_that_is_no_number_is_the_callers_mistake(share):
    with pytest.raises(ValueError):
        color(share)
