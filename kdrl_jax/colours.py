"""From a number to the colour behind a token: one scale for each measure, for the terminal and for pages.

Each measure has one hue, which lies over the page the more, the larger the value: the lightness changes
evenly from the page's to the hue's, also to those who see no red or no green, and a token of which nothing is
to be said has no colour. The hues are of equal lightness in OKLab (0.77 on light pages, 0.49 on dark ones),
and text on them has a contrast of 4.5 to 1 or more (WCAG 2.2).
"""

import dataclasses
from typing import Literal

LIGHT_PAGE, DARK_PAGE = "#ffffff", "#1b1d22"
"""Behind tokens. What a terminal has is not known: it is taken to be dark."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """The strength of a colour is (|value| / top) ** power, at most 1."""

    top: float
    """Of the strongest colour."""
    power: float
    """1/2: half of the colours are for the lowest quarter, where most tokens are."""
    light: str
    """`#rrggbb` of the strongest, on light pages."""
    dark: str
    below: tuple[str, str] | None = None
    """The same of values below 0, light and dark, if they have colours of their own."""

    def strength(self, value: float) -> float:
        return min(abs(value) / self.top, 1.0) ** self.power


SCALES = {
    "reverse_kl": Scale(3.0, 0.5, "#ff8f49", "#a14206"),
    "logprobs": Scale(6.0, 0.5, "#be9df7", "#6c44a4"),
    "advantage": Scale(2.0, 1.0, "#6bc3f4", "#176297", below=("#f8a052", "#994a00")),
}
"""By the names that rollouts have for the measures."""
LEAST = 0.05
"""A strength that is not seen."""


def colour(value: float, scale: Scale) -> str | None:
    """`#rrggbb` behind a token on a dark page, mixed in sRGB as browsers lay one colour over another; None
    where the page itself is seen."""
    strength = scale.strength(value)
    if not strength > LEAST:  # nor anything behind what is not finite
        return None
    strongest = scale.dark if scale.below is None or value > 0 else scale.below[1]
    pairs = zip(_channels(DARK_PAGE), _channels(strongest), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * strength):02x}" for a, b in pairs)


def css() -> str:
    """The same as variables of a page's style."""
    values = {"card": (LIGHT_PAGE, DARK_PAGE)}
    for name, scale in SCALES.items():
        values[f"heat-{name}"] = (scale.light, scale.dark)
        values[f"heat-{name}-below"] = scale.below or (scale.light, scale.dark)
    lines = [f"  --{name}: light-dark({light}, {dark});" for name, (light, dark) in values.items()]
    return "\n".join([":root {", *lines, "}"])


def scales() -> dict[str, dict[str, float]]:
    """The same as numbers for a page's script."""
    return {name: {"top": scale.top, "power": scale.power} for name, scale in SCALES.items()}


def ink(background: str) -> Literal["#000000", "#ffffff"]:
    """Black or white, whichever has more contrast to a colour (WCAG 2.2, relative luminance)."""
    shares = [x / 255 for x in _channels(background)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
