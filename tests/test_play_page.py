"""The page without a browser: contrast of its colours, and that page and server agree on names."""

import re
from importlib import resources

import pytest

from dreamer4_jax.play.protocol import KINDS

FILES = resources.files("dreamer4_jax.play").joinpath("page")
CSS, HTML, SCRIPT = (FILES.joinpath(name).read_text() for name in ("style.css", "index.html", "play.js"))
BACKGROUNDS = ("paper", "card", "well")


def themes() -> dict[str, dict[str, str]]:
    """Light and dark: name of a colour -> #rrggbb."""
    light, dark = re.findall(r":root \{([^}]*)\}", CSS)
    read = lambda block: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    return {"light": read(light), "dark": {**read(light), **read(dark)}}


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def too_weak(theme: str, pairs: list[tuple[str, str]], least: float) -> dict[tuple[str, str], float]:
    """The pairs of a theme's colours whose contrast is below `least`."""
    c = themes()[theme]
    found = {(a, b): contrast(c[a], c[b]) for a, b in pairs}
    return {pair: round(ratio, 2) for pair, ratio in found.items() if ratio < least}


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_itself():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(theme):
    texts = [(t, b) for t in ("ink", "soft", "dream", "real", "accent", "bad", "good") for b in BACKGROUNDS]
    texts += [("on-accent", "accent"), ("paper", "bad"), ("paper", "ink"), ("ink", "bar")]
    weak = too_weak(theme, texts, 4.5)
    assert not weak  # WCAG AA for text


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_edges_and_bars_are_visible_in_light_and_dark(theme):
    weak = too_weak(theme, [(name, b) for name in ("edge", "mark", "doubt", "dream") for b in BACKGROUNDS], 3.0)
    assert not weak  # WCAG AA for parts of controls and for graphics


def test_the_page_sends_every_kind_of_message_and_no_other():
    assert set(re.findall(r"""say\("(\w+)\"""", SCRIPT)) == set(KINDS)


def test_every_element_the_script_looks_for_is_there():
    ids = set(re.findall(r'id="([\w-]+)"', HTML))
    used = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert used <= ids, used - ids
    assert len(re.findall(r'id="', HTML)) == len(ids)


def test_everything_that_acts_has_a_name():
    for tag in re.findall(r"<canvas[^>]*>", HTML):
        assert "aria-label=" in tag or 'aria-hidden="true"' in tag, tag
    for label in re.findall(r'aria-labelledby="([\w-]+)"', HTML):
        assert f'id="{label}"' in HTML
