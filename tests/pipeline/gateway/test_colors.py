"""Text on the dashboard can be read on each surface that it may lie on."""

import re
from pathlib import Path

import pytest

import pipeline.gateway

CSS = (Path(pipeline.gateway.__file__).parent / "pages" / "dashboard.css").read_text()
COLORS = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", CSS)}
# Marks such as bars and dots are drawn with the other colors.
TEXTS = sorted(set(re.findall(r"[{;]\s*color: var\(--(\w+)\)", CSS)))
SURFACES = ["page", "panel", "sunken"]


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2), from 0 for black to 1 for white."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_black_on_white_has_the_greatest_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_the_colors_of_text_are_found():
    assert {"text", "muted", "link", "good", "warn", "bad"} <= set(TEXTS) <= set(COLORS)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_enough_contrast_on_each_surface(text: str, surface: str, scheme: int):
    # WCAG 2.2, 1.4.3: 4.5 to 1. The line of a request lies on "sunken" only while the mouse is over it.
    assert contrast(COLORS[text][scheme], COLORS[surface][scheme]) >= 4.5
