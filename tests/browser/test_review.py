"""The page of proposed pairs in a real Chromium, opened from disk: keys, storage, files, and text that stays text."""

import csv
import shutil
import time

import numpy as np
import pytest

from nabla_jax import curate
from nabla_jax.curation import page as pages
from nabla_jax.curation import verdicts
from nabla_jax.curation.proposals import ClassProposals, Proposal
from nabla_jax.data import read_dataset
from nabla_jax.images import write_image
from tests.browser.many_pairs import MARKUP

READY = "!document.getElementById('pair').hidden"
LEFT = "document.querySelector('#left + figcaption').textContent"
COUNT = "document.getElementById('count').textContent"
TALLY = "document.getElementById('tally').textContent"
NOTICE = "document.getElementById('notice').textContent"
CLASSES, PAIRS = 300, 8


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 300 classes of sixteen pictures that share few files' bytes, named by markup, commas and quotes."""
    folder = tmp_path_factory.mktemp("data") / "fish, fresh"
    rows = [["image", "class", "split", "taxonomy", "credit"]]
    (folder / "photos").mkdir(parents=True)
    for k in range(4):
        write_image(np.full((60, 80, 3), 60 * k, np.uint8), folder / f"photos/{k}.jpg")
    for c in range(CLASSES):
        (folder / f"photos/{c}").mkdir()
        for k in range(2 * PAIRS):
            name = f'photos/{c}/a "{k}", b.jpg' if c == 1 else f"photos/{c}/{k}.jpg"
            shutil.copy(folder / f"photos/{k % 4}.jpg", folder / name)
            rows.append([name, f"Fish {c} {MARKUP if c == 1 else ''}", "test", "Fishes > Cods", f"© Ann {MARKUP}"])
    with (folder / "manifest.csv").open("w", newline="") as text:
        csv.writer(text).writerows(rows)
    return read_dataset(folder)


@pytest.fixture(scope="session")
def review(data, tmp_path_factory):
    """Its page of 2,400 pairs; what a network would say of them does not matter here."""
    groups = [
        ClassProposals(
            c,
            2 * PAIRS,
            1.0 + (c == 2),
            c == 2,
            tuple(Proposal(own[2 * k], own[2 * k + 1], k / 10) for k in range(PAIRS)),
        )
        for c, own in data.classes.items()
    ]
    boxes = {e.id: (0, 0, 60, 80) for e in data.examples}
    return pages.write(tmp_path_factory.mktemp("review"), data, data.examples, groups, boxes, "a key", 64, 2)


@pytest.fixture
def page(browser, review):
    page = browser.page()
    page.open(review)
    page.wait(READY)
    return page


def order(data):
    """The pairs in the page's order: (class, picture, picture)."""
    files = [e.image.relative_to(data.root).as_posix() for e in data.examples]
    return [
        (f"{c:04d}", files[own[2 * k]], files[own[2 * k + 1]]) for c, own in data.classes.items() for k in range(PAIRS)
    ]


def shown(page):
    """The first picture of the pair on the page."""
    return page.js(LEFT).split(" · ")[0]


def download(page, folder):
    """The file that the button gives, as rows."""
    folder.mkdir(exist_ok=True)
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.js("document.getElementById('download').click()")
    end = time.monotonic() + 10
    while not (found := list(folder.glob("*.csv"))):
        assert time.monotonic() < end, "no file came"
        time.sleep(0.02)
    return found[0]


def restore(page, path):
    """Gives a file to the page's input."""
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#restore")["nodeId"]
    page.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)


def test_a_review_by_keys_from_the_first_pair_to_the_list(page, data, tmp_path):
    pairs = order(data)
    assert page.js(COUNT) == f"0 of {CLASSES * PAIRS:,} pairs judged"
    said = {}
    for i, key in enumerate("arsaAR"):
        assert shown(page) == pairs[i][1]
        page.press(key)
        said[i] = {"a": "accept", "r": "reject", "s": "skip"}[key.lower()]
    assert page.js(TALLY) == "3 accepted · 2 rejected · 1 skipped"
    for i in (5, 4):
        page.press("u")
        del said[i]
        assert shown(page) == pairs[i][1] and page.js(COUNT).startswith(f"{i} of")
    page.press("ArrowLeft")  # back to a pair that is judged, and another opinion of it
    assert shown(page) == pairs[3][1] and page.js("document.getElementById('said').textContent") == "accepted"
    page.press("r")
    said[3] = "reject"
    assert shown(page) == pairs[4][1]
    page.press("ArrowRight")
    page.press("s")
    said[5] = "skip"
    page.js("document.getElementById('download').click()")
    assert "Say who you are first" in page.js(NOTICE) and page.js("document.activeElement.id") == "reviewer"
    for key in 'Ann, "A"':  # keys are letters there
        page.press(key)
    assert page.js("document.getElementById('reviewer').value") == 'Ann, "A"' and page.js(COUNT).startswith("5 of")
    file = download(page, tmp_path / "files")
    with file.open(newline="") as text:
        rows = list(csv.reader(text))
    assert rows == [list(verdicts.COLUMNS), *([*pairs[i], 'Ann, "A"', said[i]] for i in sorted(said))]
    assert page.problems() in ([], [a for a in page.problems() if str(a).startswith("blob:")])
    curate.main(["collect", str(data.root), str(file), "--list", str(data.root / "mine.csv")])
    with (data.root / "mine.csv").open(newline="") as text:
        assert [tuple(row[:3]) for row in csv.reader(text)][1:] == [pairs[0]]


def test_verdicts_outlive_the_page_and_go_to_another_browser_as_a_file(browser, page, data, review, tmp_path):
    for key in "aars":
        page.press(key)
    page.choose("#reviewer", "Bob")
    page.open(review)
    page.wait(READY)
    assert page.js(COUNT).startswith("4 of") and page.js("document.getElementById('reviewer').value") == "Bob"
    assert shown(page) == order(data)[4][1]
    page.press("u")
    assert shown(page) == order(data)[3][1]
    page.js("[...document.querySelectorAll('#class option')][2].selected = true, "
            "document.getElementById('class').dispatchEvent(new Event('change'))")  # fmt: skip
    assert shown(page) == order(data)[PAIRS][1]
    page.press("a")  # of the class whose names have commas and quotes
    file = download(page, tmp_path / "files")
    other = browser.page()
    other.open(review)
    other.wait(READY)
    assert other.js(COUNT).startswith("0 of")
    restore(other, file)
    other.wait(f"{NOTICE}.includes('4 of 4 rows are verdicts on these pairs')")
    assert other.js(TALLY) == "3 accepted · 1 rejected · 0 skipped" and shown(other) == order(data)[3][1]
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    restore(other, wrong)
    other.wait(f"{NOTICE}.includes('not a file of verdicts')")
    assert other.js(COUNT).startswith("4 of")


def test_filters_and_the_end_of_a_list(page, data):
    page.js("(() => { const e = document.getElementById('show'); e.value = 'varied'; e.onchange(); })()")
    assert "Fish 10" in page.js("document.getElementById('name').textContent")  # the third by name
    assert page.js("!document.getElementById('varied').hidden")
    assert "8 shown" in page.js("document.getElementById('where').textContent")
    for _ in range(PAIRS):
        page.press("a")
    assert page.js(NOTICE) == "All pairs shown here are judged."
    page.js("(() => { const e = document.getElementById('show'); e.value = 'reject'; e.onchange(); })()")
    assert page.js("document.getElementById('pair').hidden && !document.getElementById('empty').hidden")
    page.press("a")  # nothing to judge
    page.press("u")
    assert page.js("document.getElementById('show').value") == "all" and page.js(COUNT).startswith(f"{PAIRS - 1} of")


def test_text_stays_text_and_nothing_is_red_in_the_console(page, data):
    for _ in range(PAIRS):
        page.press("ArrowRight")
    assert MARKUP in page.js("document.getElementById('name').textContent") and MARKUP in page.js(LEFT)
    page.wait("[...document.querySelectorAll('figure img')].every(i => i.complete && i.naturalWidth === 64)")
    assert page.js("window.broken === undefined && document.querySelectorAll('img').length === 2")
    assert page.problems() == []


def test_without_storage_the_page_says_so(browser, review):
    page = browser.page()
    page.call("Page.addScriptToEvaluateOnNewDocument",
              source="Object.defineProperty(window, 'localStorage', {get() { throw new Error('none'); }})")  # fmt: skip
    page.open(review)
    page.wait(READY)
    assert "keeps nothing" in page.js(NOTICE)
    page.press("a")
    assert "keeps nothing" in page.js(NOTICE) and page.js(COUNT).startswith("1 of")


def test_thousands_of_pairs_open_and_are_judged_at_once(browser, review):
    page = browser.page()
    page.open(review)
    page.wait(READY)
    opening = page.processor_time()
    # As after a long review: every verdict is there.
    page.js("(() => { for (let i = 0; i < 2300; i += 1) document.getElementById('accept').click(); })()")
    before = page.processor_time()
    for _ in range(20):
        page.press("s")
    judging = (page.processor_time() - before) / 20
    print(f"{CLASSES * PAIRS:,} pairs: opened in {opening:.2f} s, a verdict takes {judging * 1000:.1f} ms")
    assert page.js(COUNT).startswith("2,320 of") and opening < 2 and judging < 0.1
    stored = "Object.entries(localStorage).filter(([k, v]) => k.startsWith('nabla-review a key photos') && v).length"
    assert page.js(stored) == 2320


@pytest.mark.parametrize(("width", "dark", "mobile"), [(1280, False, False), (1280, True, False), (390, False, True)])
def test_a_pair_and_its_buttons_fit_the_window(browser, review, width, dark, mobile):
    page = browser.page(width=width, height=844, dark=dark, mobile=mobile)
    page.open(review)
    page.wait(READY)
    box = "document.getElementById('{}').getBoundingClientRect()"
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    left, right = (
        page.js(f"(({{left, right, top}}) => [left, right, top])({box.format(id)})") for id in ("left", "right")
    )
    assert left[1] <= right[0] and left[2] == right[2]  # side by side
    assert all(
        page.js(f"{box.format(id)}.bottom <= innerHeight") for id in ("left", "accept", "reject", "pass", "undo")
    )
