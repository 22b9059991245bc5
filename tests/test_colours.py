"""The colours of tokens: the scale itself, and what `sample` does with it."""

import io
import re
from pathlib import Path

import pytest
from test_sample import byte_tokenizer

from kdrl_jax.colours import SCALES, colour, css, ink, scales
from kdrl_jax.report import page as page_module
from kdrl_jax.sample import Pen, TextStream


def luminance(value):
    channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_rises_evenly_and_can_be_read_everywhere(name):
    scale = SCALES[name]
    values = [scale.top * (x / 100) ** (1 / scale.power) for x in range(101)]
    for sign in (1, -1):
        found = [colour(sign * value, scale) for value in values]
        assert found[:5] == [None] * 5  # the page itself
        light = [luminance(x) for x in found[6:]]
        assert light == sorted(light)
        assert found[-1] == (scale.below[1] if scale.below and sign < 0 else scale.dark)
        # At least 4.5 to 1, as WCAG asks of text.
        assert all(contrast(ink(x), x) >= 4.5 for x in found[6:])
    for strongest in (scale.light, *(scale.below or ())[:1]):
        assert contrast("#1c1d21", strongest) >= 4.5  # the light page's ink
    for strongest in (scale.dark, *(scale.below or ())[1:]):
        assert contrast("#e9eaee", strongest) >= 4.5  # and the dark one's
    assert colour(float("nan"), scale) is None
    assert colour(99.0, scale) == scale.dark


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_pages_have_the_terminals_colours():
    style, page = css(), (Path(page_module.__file__).parent / "page.css").read_text()
    for name, scale in SCALES.items():
        assert f"--heat-{name}: light-dark({scale.light}, {scale.dark});" in style
        assert f"var(--heat-{name})" in page
        assert scales()[name] == {"top": scale.top, "power": scale.power}
    assert "--card:" not in page
    assert "--ink: light-dark(#1c1d21, #e9eaee);" in page


@pytest.mark.parametrize("size", [1, 3, 5])
def test_pieces_are_the_text_token_by_token(size):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a é 日\nb\n")
    stream, found = TextStream(tokenizer), []
    for end in range(size, len(ids) + size, size):
        part = ids[:end]
        found += stream.pieces(part, list(range(len(part))), is_last=end >= len(ids))
    assert "".join(piece for piece, _ in found) == tokenizer.decode(ids)
    assert [value for _, value in found] == list(range(len(ids)))
    # Two bytes and three: shown with the last.
    value_of = {piece: value for piece, value in found if piece}
    assert (value_of["é"], value_of["日"]) == (3, 7)


def test_what_was_held_back_comes_in_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé")[:-1]
    stream = TextStream(tokenizer)
    assert [piece for piece, _ in stream.pieces(ids, [0.0, 1.0], is_last=False)] == ["a", ""]
    assert list(stream.pieces(ids, [0.0, 1.0], is_last=True)) == [("\ufffd", 1.0)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [None, "1"])
def test_colours_are_for_terminals_that_want_them(no_color, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    pen = Pen(Terminal(), coloured=True)
    assert pen.coloured == (no_color is None)
    assert not Pen(Terminal(), coloured=False).coloured
    assert not Pen(io.StringIO(), coloured=True).coloured
    if pen.coloured:
        pen.write("likely\n", 0.0)
        pen.write(" [b]not[/b] ", -SCALES["logprobs"].top)
        pen.legend()
        text = pen._console.file.getvalue()
        assert text.startswith("likely\n\x1b[38;2;255;255;255;48;2;108;68;164m [b]not[/b] \x1b[0m\n")
        assert "-log p, nats" in text
        assert " 6 or more " in text


@pytest.mark.parametrize("no_color", [None, "1"])
def test_colours_are_for_notebooks_that_ask_for_them(no_color, monkeypatch):
    """A shell cell's output is a pipe, in an environment with FORCE_COLOR."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-color")
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    pen = Pen(io.StringIO(), coloured=True)
    assert pen.coloured == (no_color is None)
    if pen.coloured:
        pen.write("unlikely", -2.5)  # rich keeps the codes of a style that it has seen
        assert re.fullmatch(r"\x1b\[38;5;\d+;48;5;\d+munlikely\x1b\[0m", pen._console.file.getvalue())
