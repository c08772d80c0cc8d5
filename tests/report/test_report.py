"""The static report: it shows what the evaluation says, and works from a file, offline."""

import html.parser
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_jax import evaluate as verb
from nabla_jax import report
from nabla_jax.errors import UserError
from nabla_jax.images import read_rgb
from nabla_jax.metrics import summary
from nabla_jax.report import pages, plots
from tests import fake_world

MODELS = {
    "untuned": lambda right, sibling, target, mask: np.where(mask[..., None], 128.0, target),
    "demo": lambda right, sibling, target, mask: (3 * right + sibling) / 4,
    "autoencoder-ceiling": lambda right, sibling, target, mask: right,
}


class Page(html.parser.HTMLParser):
    """Every start tag with its attributes; fails on tags that are closed out of order."""

    void = frozenset({"meta", "link", "img", "input", "br", "circle", "line", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(evaluation folder, report folder, summary rows)."""
    folder = tmp_path_factory.mktemp("report")
    fake_world.write_world(folder / "birds")
    pictures = {}
    for name, make in MODELS.items():
        fake_world.write_pictures(folder / "birds", folder / name / "ellipses", make)
        pictures[name] = folder / name
    run = folder / "run"
    run.mkdir()
    rows = [{"step": i, "loss": 1 / i} for i in range(1, 50)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(fake_world.register(folder / "installed")))
        found = verb.evaluate(pictures, {"ellipses": folder / "birds"}, folder / "results", workers=0)
    report.write(folder / "results", folder / "out", run=run, gallery=6)
    return folder / "results", folder / "out", found


def test_the_page_is_well_formed_and_needs_no_network(built):
    _, out, _ = built
    text = (out / "index.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name, "")
            assert not re.match(r"(https?:)?//", value or "")
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    local = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert local and all((out / file).is_file() for file in local)
    anchors = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert anchors == {a["id"] for a in page.all("section")}
    assert {"results", "intervals", "training", "gallery", "provenance"} <= anchors


def test_every_number_of_the_summary_is_in_the_table(built):
    _, out, rows = built
    text = re.sub(r"</?b>", "", (out / "index.html").read_text())
    for row in rows:
        assert pages._cell(row) in text
    assert json.loads((out / "summary.json").read_text()) == rows


def test_the_best_model_is_bold_but_bounds_and_reference_points_are_not(built):
    _, out, rows = built
    text = (out / "index.html").read_text()
    table = text[text.index("<table>") : text.index("</table>")]
    lines = re.findall(r'<tr class="(\w+)"><td>([^<]+)</td>(.*?)</tr>', table)
    assert [(kind, name) for kind, name, _ in lines] == [
        ("model", "untuned"),
        ("model", "demo"),
        ("bound", "autoencoder-ceiling"),
        *(("reference", name) for name in verb.REFERENCES),
    ]
    bold = {name: cells.count("<b>") for _, name, cells in lines}
    assert bold == dict.fromkeys(bold, 0) | {"demo": len(summary.METRICS)}


def test_ties_are_all_best():
    rows = [{"model": m, "metric": "rmse", "mean": v} for m, v in [("a", 2.0), ("b", 1.0), ("c", 1.0)]]
    assert pages.best_models(rows) == ["b", "c"]
    assert pages.best_models([r | {"metric": "ssim"} for r in rows]) == ["a"]
    assert pages.best_models([]) == []


def test_the_gallery_shows_each_pair_in_order_with_its_pictures(built):
    results, out, _ = built
    page = Page((out / "index.html").read_text())
    pairs = page.all("article", **{"class": "pair"})
    assert len(pairs) == 6
    images = page.all("img", loading="lazy")
    labels = [re.match(r"(.*) of pair", a["alt"]).group(1) for a in images]
    assert labels == ["subject", "control", "target", *MODELS, "right answer"] * 6
    assert all((out / a["src"]).is_file() for a in images)
    scores = json.loads(pairs[0]["data-scores"])
    assert set(scores) == set(MODELS)
    stored = {s.pair: s for s in summary.from_csv(results / "pairs" / "ellipses" / "demo.csv")}
    key = re.search(r"of pair (\w+)", images[0]["alt"]).group(1)
    assert scores["demo"]["rmse"] == pytest.approx(stored[key].rmse, abs=1e-4)
    identity = 1 - stored[key].right_error / stored[key].sibling_error
    assert scores["demo"]["normalised_identity"] == pytest.approx(identity, abs=1e-4)
    target, control = read_rgb(out / images[2]["src"]), read_rgb(out / images[1]["src"])
    centre = tuple(side // 2 for side in target.shape[:2])
    assert control[centre].max() < 16 < target[centre].max()  # the silhouette is black in the control


def test_a_report_beside_the_results_is_the_same_page(built, tmp_path):
    results, _, _ = built
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    report.write(copy, copy, gallery=2)
    report.write(results, tmp_path / "elsewhere", gallery=2)
    assert (copy / "index.html").read_bytes() == (tmp_path / "elsewhere" / "index.html").read_bytes()
    assert "Training" not in (copy / "index.html").read_text()


def test_text_from_the_data_is_escaped(built, tmp_path):
    results, _, _ = built
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    for path in (copy / "pairs" / "ellipses").glob("*.csv"):
        path.write_text(path.read_text().replace("Bird 0", "<script>alert(1)</script>"))
    report.write(copy, copy, gallery=14)
    assert "<script>alert" not in (copy / "index.html").read_text()


def test_missing_inputs_are_named(built, tmp_path):
    results, _, _ = built
    with pytest.raises(UserError, match=r"summary\.json: no such file"):
        report.write(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"metrics\.jsonl: found no row"):
        report.write(results, tmp_path / "out", run=tmp_path)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_even_and_cover_the_range(a, b, count):
    low, high = sorted((a, b))
    if high - low < 1e-3:
        high = low + 1
    ticks = plots.nice_ticks(low, high, count)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0], rtol=1e-4, atol=1e-9)
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3
    assert 1 <= len(steps) <= count + 2


@pytest.mark.parametrize("marks", [[], [0.0]])
def test_interval_plots_place_values_in_order(marks):
    rows = [
        {"model": f"<{i}>", "metric": "x", "mean": m, "low": m - 0.1, "high": m + 0.2, "n": 3}
        for i, m in enumerate((0.3, -0.2, 0.9))
    ]
    drawn = ElementTree.fromstring(plots.intervals(rows, ["model", "bound", "reference"], marks))
    centres = [float(c.get("cx")) for c in drawn.iter("circle")]
    bars = [(float(b.get("x1")), float(b.get("x2"))) for b in drawn.iter("line") if b.get("class") == "bar"]
    assert centres[1] < centres[0] < centres[2]
    assert all(a < c < b for c, (a, b) in zip(centres, bars, strict=True))
    assert (centres[2] - centres[0]) / (centres[0] - centres[1]) == pytest.approx(0.6 / 0.5, abs=0.01)
    assert min(min(pair) for pair in bars) >= plots.LABEL_WIDTH


@pytest.mark.parametrize("values", [[1.0], [2.0, 1.0], [0.5] * 30, [1 / (i + 1) for i in range(500)]])
def test_curves_of_any_length_are_drawn_inside_their_frame(values):
    drawn = ElementTree.fromstring(plots.curve(range(1, len(values) + 1), values))
    width, height = (float(v) for v in drawn.get("viewBox").split()[2:])
    for line in drawn.iter("polyline"):
        points = np.array([[float(v) for v in p.split(",")] for p in line.get("points").split()])
        assert len(points) == len(values)
        assert points.min() >= 0 and points[:, 0].max() <= width and points[:, 1].max() <= height
    raw = next(line for line in drawn.iter("polyline") if line.get("class") == "raw")
    heights = [float(p.split(",")[1]) for p in raw.get("points").split()]
    assert heights == sorted(heights)  # falling values go down the page
