"""The report in a browser: what is drawn, and what clicks and keys do."""

import itertools
import json
import math
import re
import shutil

import browser
import pytest
from report_runs import HOSTILE, make_run, page_of, rollouts

from kdrl_jax.metrics import write_jsonl
from kdrl_jax.report import viewer_page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.PATH is None:
        pytest.skip("no Chromium here")
    driven = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield driven
    driven.close()


@pytest.fixture
def clean(chromium):
    """The browser, which must have nothing to complain about."""
    chromium.errors.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.errors == []
    assert all(url.startswith(("file:", "data:")) for url in chromium.requests)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return page_of(make_run(folder, "run", of=60))


def test_curves_are_drawn_and_read_out(clean, opened):
    clean.open(opened)
    assert clean.run("document.title") == "run"
    titles = clean.run("[...document.querySelectorAll('.panel h3')].map((x) => x.textContent)")
    assert any("held-out accuracy" in t for t in titles)
    empty = """[...document.querySelectorAll('.panel')].filter((p) =>
        ![...p.querySelectorAll('path.line, path.area')].some((x) => x.getBBox().width > 50)).length"""
    assert clean.run(empty) == 0
    assert clean.run("document.querySelectorAll('path.ahead').length") >= 3
    assert clean.run("document.querySelectorAll('.mark.alarm').length") == 1
    assert clean.run("document.querySelectorAll('.whisker').length") == 4
    first = "document.querySelector('.panel .readout').textContent"
    before = clean.run(first)
    clean.run("document.querySelector('.chart').focus()")
    clean.key("ArrowLeft")
    clean.key("ArrowLeft")
    assert clean.run("document.getElementById('cursor-step').textContent") == "step 38"
    assert clean.run(first) != before
    clean.hover(".panel:nth-child(3) .chart")
    assert clean.run("document.getElementById('cursor-step').textContent") != "step 38"
    visible = "document.querySelectorAll('.panel:first-child path.line').length"
    count = clean.run(visible)
    clean.click(".panel:first-child .key")
    assert clean.run(visible) == count - 1
    ticks = "[...document.querySelectorAll('.panel:nth-child(3) .tick')].map((x) => x.textContent).join()"
    linear = clean.run(ticks)
    clean.click(".panel:nth-child(3) .panel-head button")
    assert clean.run(ticks) != linear
    line = "document.querySelector('.panel:last-child path.line:last-of-type').getAttribute('d')"
    clean.run(
        "const s = document.getElementById('smoothing'); s.value = 4; s.dispatchEvent(new Event('input'))"
    )
    assert clean.run("document.querySelectorAll('path.raw').length") > 5
    assert clean.run(line)


def shown(page):
    return page.run("document.querySelectorAll('.card').length")


def test_the_viewer_by_clicks(clean, opened):
    clean.open(opened)
    clean.click("#prompt-2")
    assert shown(clean) == 4
    for name, count in (("correct", 2), ("wrong", 2), ("truncated", 1)):
        clean.click(f"[data-filter={name}]")
        assert shown(clean) == count, name
        if name == "correct":
            assert clean.run("document.querySelectorAll('.card .verdict.wrong').length") == 0
    clean.click("[data-filter=wrong]")
    clean.click("[data-filter=truncated]")
    clean.click("[data-filter=high]")
    assert shown(clean) == 1
    clean.click("[data-filter=high]")
    colours = []
    for name in ("reverse_kl", "advantage", "logprobs"):
        clean.click(f"[data-colour={name}]:not(.viewer)")
        colours.append(
            clean.run(
                "[...document.querySelectorAll('.card:last-child .t')].slice(0, 9)"
                ".map((x) => getComputedStyle(x).backgroundColor).join('|')"
            )
        )
    assert len(set(colours)) == 3
    # Tokens of different KL have different colours, those of one advantage the same one.
    assert len(set(colours[0].split("|"))) == 3
    assert len(set(colours[1].split("|"))) == 1
    clean.hover(".card .t:nth-child(5)")
    said = clean.run("document.getElementById('tip').innerText")
    assert "70.0 %" in said
    assert "chosen" in said
    search = "document.querySelector('input[type=search]')"
    clean.run(f"{search}.value = '3.1'; {search}.dispatchEvent(new Event('input'))")
    assert shown(clean) == 1
    before = clean.run("document.querySelector('.asked .question').textContent")
    clean.click("[aria-label='earlier step']")
    clean.run("new Promise((done) => setTimeout(done, 200))")
    assert clean.run("document.querySelector('.asked .question').textContent") != before
    # What models have said is text.
    assert clean.run("document.title") == "run"
    assert clean.run("document.querySelectorAll('main img, main b').length") == 0
    assert HOSTILE in clean.run("document.querySelector('.card .text').textContent")


def test_the_viewer_by_keys(clean, opened):
    clean.open(opened)
    clean.run("document.querySelector('.prompts').focus()")
    clean.key("ArrowDown")
    assert clean.run("document.querySelector('[aria-selected=true]').id") == "prompt-1"
    clean.run("document.querySelector('.card .t').focus()")
    clean.key("ArrowRight")
    clean.key("ArrowRight")
    assert clean.run("document.activeElement.number") == 2
    assert clean.run("document.getElementById('tip').hidden") is False
    clean.key("Escape")
    assert clean.run("document.getElementById('tip').hidden") is True
    clean.run("document.querySelector('[role=radio][aria-checked=true]').focus()")
    clean.key("ArrowRight")
    assert clean.run("document.querySelector('.viewer').dataset.colour") == "advantage"


def test_the_tip_goes_along_with_a_token_that_is_reached_by_keys(clean, opened):
    clean.open(opened, height=500)
    clean.run("scrollTo(0, 0)")
    clean.run("document.querySelector('.card:last-child .t').focus({preventScroll: true})")
    before = clean.run("document.getElementById('tip').getBoundingClientRect().top")
    clean.run("document.activeElement.scrollIntoView({block: 'center'})")
    clean.run("new Promise((done) => setTimeout(done, 300))")
    tip, token = (
        clean.run(f"{x}.getBoundingClientRect().toJSON()")
        for x in ("document.getElementById('tip')", "document.activeElement")
    )
    assert clean.run("document.getElementById('tip').hidden") is False
    assert tip["top"] != before
    assert abs(tip["top"] - token["bottom"]) < 12 or abs(tip["bottom"] - token["top"]) < 12
    # One that a pointer has reached is left behind.
    clean.run("document.activeElement.blur()")
    clean.hover(".card .t:nth-child(5)")
    clean.run("scrollBy(0, 60); new Promise((done) => setTimeout(done, 300))")
    assert clean.run("document.getElementById('tip').hidden") is True


def test_seeds_that_have_not_come_as_far(clean, tmp_path):
    """The mean ends where the first seed ends, the other goes on by itself, and the schedule after that
    one."""
    long = make_run(tmp_path, "long", steps=40, of=60)
    short = make_run(tmp_path, "short", steps=25, of=60, seed=1, every=25)
    other = make_run(tmp_path, "other", steps=30, of=60, overrides=["kd.coef=0.25"])
    clean.open(page_of(long, short, other))

    def paths(title, kind, colour=0):
        found = clean.run(
            "[...document.querySelectorAll('.panel')]"
            f".filter((p) => p.querySelector('h3').firstChild.textContent === '{title}')"
            f".map((p) => [...p.querySelectorAll('path.{kind}.s{colour}')]"
            ".map((x) => x.getAttribute('d')))[0]"
        )
        return [[float(x) for x in re.findall(r"[ML]([\d.]+)", d)] for d in found]

    mean, single = paths("reward", "line:not(.alone):not(.ahead)")[0], paths("reward", "alone")[0]
    assert all(a < b for a, b in itertools.pairwise(mean))
    step = (mean[-1] - mean[0]) / 24
    assert single[0] == pytest.approx(mean[-1], abs=0.2)
    assert single[-1] == pytest.approx(mean[0] + 39 * step, abs=0.5)
    for ahead in paths("coefficients", "ahead"):
        assert all(a < b for a, b in itertools.pairwise(ahead))
        assert ahead[0] == pytest.approx(mean[0] + 39 * step, abs=0.5)
    # Parts of a whole: each group has a chart of its own.
    stacked = "[...document.querySelectorAll('.panel')].filter((p) => p.querySelector('path.area')).length"
    assert clean.run(stacked) == 2


def test_what_is_not_finite_is_shown_as_nothing(clean, tmp_path):
    run = make_run(tmp_path, "run")
    rows = rollouts(30)
    nan = float("nan")
    for row in rows[:3]:
        row["advantage"] = row["reward"] = nan
        row["tokens"] |= {
            k: [nan] * len(row["tokens"][k]) for k in ("logprobs", "reverse_kl", "teacher_logprobs")
        }
        row["tokens"]["teacher_top"] = [[["<", nan, nan]] for _ in row["tokens"]["texts"]]
        row["tokens"]["teacher_rank"] = [None for _ in row["tokens"]["texts"]]
    (run / "rollouts" / "step_000030.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = {"step": 20, "num_prompts": 64, "greedy/accuracy": nan, "greedy/accuracy_ci": [nan, nan]}
    (run / "eval" / "step_000020.json").write_text(json.dumps(found))
    clean.open(page_of(run))
    for name in ("advantage", "logprobs", "reverse_kl"):
        clean.click(f"[data-colour={name}]:not(.viewer)")
    clean.hover(".card .t:nth-child(5)")
    assert "–" in clean.run("document.getElementById('tip').innerText")
    assert "NaN" not in clean.run("document.body.innerHTML")
    assert "not finite" in clean.run("document.getElementById('evaluations').innerText")


def test_without_a_teacher_the_advantage_is_shown_first(clean, tmp_path):
    run = make_run(tmp_path, "run")
    for file in (run / "rollouts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["tokens"] = {k: row["tokens"][k] for k in ("texts", "names", "logprobs")}
        write_jsonl(file, rows)
    shown = "document.querySelector('.viewer').dataset.colour"
    clean.open(page_of(run))
    assert clean.run(shown) == "advantage"
    clean.click("[data-colour=logprobs]:not(.viewer)")
    clean.run("document.getElementById('viewer-step').selectedIndex = 0")
    clean.run("document.getElementById('viewer-step').dispatchEvent(new Event('change'))")
    assert clean.run(shown) == "logprobs"


def test_half_a_character_and_what_the_teacher_has_drawn(clean, tmp_path):
    """The rank says whether the teacher would have chosen the token, whatever its text is."""
    run = make_run(tmp_path, "run")
    rows = rollouts(30, text="ab")
    for row in rows:
        t = row["tokens"]
        t["texts"][:2], t["names"] = ["", "é"], {"0": "Ã", str(len(t["texts"]) - 1): "<end>"}
        t["teacher_top"][0] = t["teacher_top"][1] = [["\xa9 by itself", 0.9, 0.5]]
        t["teacher_rank"][:2] = [0, 0]
        row |= {"sampler": "teacher", "completion": "".join(t["texts"])}
        t["student_logprobs"] = [math.log(0.125)] * len(t["texts"])
        t["teacher_rank"][3], t["teacher_top"][3] = None, [["x", 0.4, 0.1]]
    write_jsonl(run / "rollouts" / "step_000030.jsonl", rows)
    clean.open(page_of(run))
    marked = (
        "[...document.querySelectorAll('.card:first-child .t')].map((x) => x.classList.contains('other'))"
    )
    assert clean.run(marked)[:4] == [False, False, True, True]
    assert "the teacher" in clean.run("document.querySelector('.card .facts').innerText")
    clean.hover(".card .t:nth-child(4)")
    said = clean.run("document.getElementById('tip').innerText")
    assert "the teacher's log-probability" in said
    assert "12.5 %" in said  # the student's, of the token that was drawn


def test_held_out_answers_are_in_the_viewer(clean, tmp_path):
    run = make_run(tmp_path, "run")
    answer = {"completion": "so 4", "correct": True, "tokens": 3, "finish": "end"}
    asked = {"question": "2+2?", "answer": "4", "source": "sums"}
    rows = [asked | {"greedy": answer, "sampled": [answer | {"correct": False}, answer]}] * 2
    write_jsonl(run / "eval" / "samples" / "step_000020.jsonl", rows)
    write_jsonl(run / "eval" / "samples" / "teacher.jsonl", rows)
    clean.open(page_of(run))
    clean.run("document.querySelector('.viewer select').value = 1")
    clean.run("document.querySelector('.viewer select').dispatchEvent(new Event('change'))")
    clean.run("new Promise((done) => setTimeout(done, 300))")
    assert shown(clean) == 3
    assert clean.run("document.querySelectorAll('.prompt').length") == 2
    assert "greedy · ended" in clean.run("document.querySelector('.card').innerText")


def test_narrow_and_dark(clean, opened):
    wide = "document.documentElement.scrollWidth <= innerWidth"
    clean.open(opened, width=375, height=800, dark=True)
    assert clean.run(wide)
    dark = clean.run("getComputedStyle(document.body).backgroundColor")
    clean.click("#theme")
    assert clean.run("getComputedStyle(document.body).backgroundColor") != dark
    clean.click("#theme")
    assert clean.run("getComputedStyle(document.body).backgroundColor") == dark
    clean.click("#theme")
    clean.click(".card .t:nth-child(3)")
    assert clean.run(wide)
    box = "document.getElementById('tip').getBoundingClientRect()"
    assert 0 <= clean.run(f"{box}.left") < clean.run(f"{box}.right") <= 375


def test_300_steps_are_small_and_open_at_once(clean, tmp_path):
    """A run as long as the quickstart's, with samples of every tenth step."""
    page = page_of(make_run(tmp_path, "long", steps=300))
    assert page.stat().st_size < 5_000_000
    assert clean.open(page) < 2.0


def test_a_page_of_samples_alone(clean, tmp_path):
    run = make_run(tmp_path, "run")
    files = sorted((run / "rollouts").glob("*.jsonl"))[:2]
    old = json.loads(files[0].read_text().splitlines()[0])
    for name in ("tokens", "advantage", "correct"):
        old.pop(name)
    shutil.copy(files[0], tmp_path / "kept.jsonl")
    write_jsonl(files[0], [old])
    page = tmp_path / "viewer.html"
    page.write_text(viewer_page(files, "first and second"))
    clean.open(page)
    assert clean.run("document.querySelectorAll('.panel').length") == 0
    assert shown(clean) == 4
    # Rows of before there were tokens.
    clean.click("[aria-label='earlier step']")
    clean.run("new Promise((done) => setTimeout(done, 200))")
    assert shown(clean) == 1
    assert clean.run("document.querySelector('.card .text').textContent").startswith(HOSTILE)
