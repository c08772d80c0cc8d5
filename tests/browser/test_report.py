"""The report in a real Chromium, opened from disk: 10,000 pairs, keyboard, themes, phone, and text that stays text."""

import json
import os
import time

import numpy as np
import pytest

from nabla_jax import report
from tests.browser.many_pairs import BENCHMARKS, MARKUP

READY = "document.querySelectorAll('.pair').length > 0"
COUNT = "document.getElementById('count').textContent"
TITLES = "[...document.querySelectorAll('.pair h3 small')].map(e => e.textContent)"


@pytest.fixture
def page(browser, few):
    page = browser.page()
    page.open(few.page)
    page.wait(READY)
    return page


def keys(page):
    """Pair keys of the page's rows, in order."""
    return [text.rpartition("pair ")[2] for text in page.js(TITLES)]


def test_ten_thousand_pairs_open_sort_and_filter_in_two_seconds(browser, many):
    """Processor time of the page, which other work on the machine does not change; elapsed time where there is none."""
    tries = []
    for _ in range(3):
        # A tab of its own each time: nothing is kept in memory.
        page = browser.page()
        page.open(many.page)
        page.wait(READY)
        opened = page.js("performance.now()") / 1000
        assert page.js(COUNT) == "1–24 of 10,000 pairs"
        opening = page.processor_time()
        start = time.monotonic()
        page.choose("#controls [name=sort]", "rmse")
        page.choose("#controls [name=group]", "Gulls")
        page.choose("#controls [name=words]", "bird ann")
        assert keys(page)[0] == max(gulls(many), key=lambda s: s.rmse).pair
        tries.append((opening, opened, page.processor_time() - opening, time.monotonic() - start))
        page.close()
    opening, opened, working, worked = map(min, zip(*tries, strict=True))
    print(f"10,000 pairs: opened in {opened:.2f} s ({opening:.2f} s of processor time), ", end="")
    print(f"sorted and filtered twice in {worked:.2f} s ({working:.2f} s)")
    assert opening < 2 and working < 2
    if os.getloadavg()[0] < os.cpu_count():
        assert opened < 2 and worked < 2


def gulls(many):
    """Of the set that is sorted by at first: the last model."""
    return [s for s in many.scores[BENCHMARKS[0], MARKUP] if s.order == "Gulls"]


def test_nothing_red_in_the_console_and_no_request_leaves_the_disk(page):
    for section in ("intervals", "groups", "regression", "extremes", "gallery", "provenance"):
        page.js(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
    page.wait("document.querySelectorAll('#worst img').length == 16 && document.querySelector('.forest') !== null")
    page.wait("[...document.querySelectorAll('.pair img')].filter(i => i.complete && i.naturalWidth).length > 8")
    assert page.problems() == []


@pytest.mark.parametrize("descending", [False, True])
def test_sorting_by_a_metric_of_a_set(page, few, descending):
    page.choose("#controls [name=sort]", "ssim")
    page.choose("#controls [name=of]", MARKUP)
    page.choose("#controls [name=order]", "down" if descending else "up")
    scores = few.scores[BENCHMARKS[0], MARKUP]
    known = [s for s in scores if s.ssim is not None]
    sign = -1 if descending else 1
    expected = [s.pair for s in sorted(known, key=lambda s: sign * round(s.ssim, 5))]
    assert keys(page) == expected[:24]
    page.js("(() => { const e = document.querySelector('.pager input'); e.value = 1e6; e.onchange(); })()")
    last = [s.pair for s in scores if s.ssim is None]  # pairs without the number come last either way
    rest = few.pairs % 24 or 24
    assert keys(page) == last[-rest:]


def test_choosing_a_metric_shows_its_worst_pairs_and_differences_of_sets_sort_too(page, few):
    page.choose("#controls [name=of]", "demo\nuntuned")
    page.choose("#controls [name=sort]", "rmse")
    mine, base = (few.scores[BENCHMARKS[0], name] for name in ("demo", "untuned"))
    difference = np.array([round(a.rmse, 5) - round(b.rmse, 5) for a, b in zip(mine, base, strict=True)])
    assert keys(page) == [mine[i].pair for i in np.argsort(-difference, kind="stable")[:24]]


def test_filters_by_class_order_and_words(page, few):
    scores = few.scores[BENCHMARKS[0], "demo"]
    name = f"Bird 5 {MARKUP}"
    page.choose("#controls [name=class]", name)
    of_class = [s.pair for s in scores if few.class_of[s.target_id] == name]
    assert keys(page) == of_class[:24] and page.js(COUNT).endswith(f"of {len(of_class):,} pairs")
    page.choose("#controls [name=class]", "")
    page.choose("#controls [name=group]", "Gulls")
    assert page.js(COUNT).endswith(f"of {sum(s.order == 'Gulls' for s in scores):,} pairs")
    page.choose("#controls [name=words]", "pair 17_2in1")
    page.choose("#controls [name=group]", "")
    assert keys(page) == ["17_2in1", "117_2in1", "217_2in1"]
    page.choose("#controls [name=words]", "no such bird")
    assert page.js(COUNT) == "0 pairs" and keys(page) == []
    page.choose("#controls [name=words]", "")
    page.choose("#controls [name=benchmark]", BENCHMARKS[1])
    page.wait(f"{COUNT}.endsWith('of 50 pairs')")


def test_a_row_shows_its_pictures_in_order_and_sets_can_be_hidden(page):
    captions = "[...document.querySelector('.pair').querySelectorAll('figcaption b')].map(e => e.textContent)"
    drawn = ["untuned", "difference", "demo", "difference", MARKUP, "difference", "autoencoder-ceiling", "difference"]
    assert page.js(captions) == ["subject", "control", "target", *drawn]
    page.js("document.querySelectorAll('#chips input')[0].click()")
    assert page.js(captions) == ["subject", "control", "target", *drawn[2:]]


def test_the_address_keeps_the_view(browser, few, page):
    page.choose("#controls [name=sort]", "rmse")
    page.choose("#controls [name=group]", "Passerines")
    page.press("]")
    seen, address = keys(page), page.js("location.hash")
    again = browser.page()
    again.open(few.page, anchor=address)
    again.wait(READY)
    again.wait(f"{COUNT}.startsWith('25–48')")
    assert keys(again) == seen


def test_all_of_it_by_keyboard(page):
    page.press("/")
    assert page.js("document.activeElement.name") == "words"
    for letter in "17_2":
        page.press(letter)
    assert keys(page)[0] == "17_2in1"
    page.js("document.querySelector('.pair .generated button').focus()")
    page.press("Enter")
    assert page.js("document.getElementById('zoom').open")
    title = "document.getElementById('zoom-title').textContent"
    shown = "document.querySelector('#zoom [aria-pressed=true]').textContent"
    first = page.js(title)
    assert page.js(shown) == "untuned"
    page.press("ArrowLeft")
    assert page.js(shown) == "target"
    page.press("ArrowDown")
    assert page.js(title) != first
    page.press("ArrowUp")
    assert page.js(title) == first
    page.press("Escape")
    assert not page.js("document.getElementById('zoom').open")
    assert page.js("document.activeElement.className") == "frame"  # back where one was
    reachable = (
        "[...document.querySelectorAll('main button, main select, main input, main summary, main .scroll')]"
        ".every(e => e.tabIndex === 0)"
    )
    assert page.js(reachable)


def test_markup_from_outside_is_shown_as_text(page, few):
    page.choose("#controls [name=class]", f"Bird 5 {MARKUP}")
    assert page.js("document.querySelector('.pair h3').firstChild.textContent") == f"Bird 5 {MARKUP}"
    assert f"Ann {MARKUP} O'Hara" in page.js("document.querySelector('.pair .credit').textContent")
    page.js("document.querySelector('.pair .generated button').click()")
    page.choose("#groups-controls [name=group]", "order")
    page.wait("document.querySelector('.forest') !== null")
    assert page.js("window.broken") is None
    assert page.js("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    text = page.js("document.body.innerText")
    assert text.count(MARKUP) > 5 and "&lt;" not in text


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c[3] > 200) return c;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!text || e.closest('script, style, noscript, svg, option, :disabled, .skip') || !e.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className}: ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_both_read_well_and_can_be_switched(browser, few, dark):
    page = browser.page(dark=dark)
    page.open(few.page)
    page.wait(READY)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.js(ground)
    assert (sum(json.loads(before.replace("rgb(", "[").replace(")", "]"))) < 300) == dark
    assert page.js(CONTRAST) == []
    page.js("document.getElementById('theme').click()")
    assert page.js(ground) != before
    assert page.js(CONTRAST) == []
    page.js("document.getElementById('theme').click()")
    assert page.js(ground) == before


def test_a_phone_never_scrolls_sideways_but_inside_tables(browser, few):
    page = browser.page(width=390, height=844, mobile=True)
    page.open(few.page)
    page.wait(READY)
    assert page.js("document.documentElement.scrollWidth") <= 390
    page.js("document.querySelector('.pair .generated button').click()")
    assert page.js("document.getElementById('zoom').getBoundingClientRect().right") <= 390
    assert page.problems() == []


def test_groups_sort_by_their_headings(page, few):
    page.wait("document.querySelector('.forest') !== null")
    page.choose("#groups-controls [name=group]", "class")
    rows = "[...document.querySelectorAll('.forest tbody tr')]"
    values = f"{rows}.map(r => Number(r.cells[2].querySelector('.value').textContent))"
    page.js("document.querySelectorAll('.forest thead button')[2].click()")
    found = page.js(values)
    assert len(found) == len({s.species for s in few.scores[BENCHMARKS[0], "demo"]}) and found == sorted(
        found, reverse=True
    )
    page.js("document.querySelectorAll('.forest thead button')[2].click()")
    assert page.js(values) == sorted(found)


def test_two_evaluations_side_by_side(browser, few, tmp_path):
    first = few.page.parent.parent / "evaluation"
    second = tmp_path / "second"
    for source in first.rglob("*"):
        if source.is_file():
            copy = second / source.relative_to(first)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text()
            copy.write_text(text.replace("Passerines", "Songbirds") if source.stem == "demo" else text)
    page = browser.page()
    page.open(report.write({"first": first, "second": second}, tmp_path / "both", gallery=60))
    page.wait(READY)
    names = page.js("[...document.querySelectorAll('#chips label')].map(e => e.textContent)")
    assert names == ["untuned", "demo (first)", MARKUP, "demo (second)", "autoencoder-ceiling"]
    assert page.problems() == []
