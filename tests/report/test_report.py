"""The static report: it shows what the evaluation says, and works from a file, offline."""

import dataclasses
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
from nabla_jax.report import __main__ as command
from nabla_jax.report import pages, plots, reading, thumbnails, vocabulary
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


def columns(out, number=0):
    """What a report's script hands to the page for a benchmark."""
    text = (out / pages.FOLDER / f"pairs-{number}.js").read_text()
    return json.loads(re.fullmatch(r"nablaReport\.pairs\((.*)\);\n", text)[1])


def test_the_page_is_well_formed_and_needs_no_network(built):
    _, out, _ = built
    text = (out / "index.html").read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            value = attributes.get(name, "")
            assert not re.match(r"(https?:)?//", value or "")
    script = (out / pages.FOLDER / "report.js").read_text()
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "http:", "https:", "innerHTML", "insertAdjacentHTML"):
        assert word not in text + script
    local = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    local += [a["src"] for a in page.all("script") if "src" in a]
    assert local and all((out / file).is_file() for file in local)
    anchors = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert anchors - {"main"} == {a["id"] for a in page.all("section")}
    assert {"results", "intervals", "groups", "extremes", "training", "gallery", "provenance"} <= anchors


def test_every_number_of_the_summary_is_in_the_table(built):
    _, out, rows = built
    text = re.sub(r"</?b>", "", (out / "index.html").read_text())
    for row in rows:
        assert pages._cell(row) in text
    assert json.loads((out / "summary.json").read_text()) == rows


def test_the_best_model_is_bold_but_bounds_and_reference_points_are_not(built):
    _, out, rows = built
    text = (out / "index.html").read_text()
    table = text[text.index('aria-label="Results on ellipses"') : text.index('<div class="terms">')]
    lines = re.findall(r'<tr class="(\w+)"><td>([^<]+)</td>(.*?)</tr>', table)
    assert [(kind, name) for kind, name, _ in lines] == [
        ("model", "untuned"),
        ("model", "demo"),
        ("bound", "autoencoder-ceiling"),
        *(("reference", name) for name in verb.REFERENCES),
    ]
    bold = {name: cells.count("<b>") for _, name, cells in lines}
    assert bold == dict.fromkeys(bold, 0) | {"demo": len({r["metric"] for r in rows})}


def test_ties_are_all_best():
    rows = [{"model": m, "metric": "rmse", "mean": v} for m, v in [("a", 2.0), ("b", 1.0), ("c", 1.0)]]
    assert pages.best_models(rows) == ["b", "c"]
    assert pages.best_models([r | {"metric": "ssim"} for r in rows]) == ["a"]
    assert pages.best_models([r | {"metric": "lpips_subject"} for r in rows]) == []  # neither direction is better
    assert pages.best_models([]) == []


def test_the_gallery_has_each_pair_in_order_with_its_pictures(built):
    results, out, _ = built
    data = columns(out)
    stored = {s.pair: s for s in summary.from_csv(results / "pairs" / "ellipses" / "demo.csv")}
    pairs = data["columns"]["pair"]
    assert len(pairs) == 6 and pairs == sorted(pairs, key=list(stored).index)
    assert [s["name"] for s in data["sets"]] == list(MODELS)
    demo = data["sets"][1]
    for i, key in enumerate(pairs):
        score = stored[key]
        assert demo["values"]["rmse"][i] == pytest.approx(score.rmse, abs=1e-4)
        identity = 1 - score.right_error / score.sibling_error
        assert demo["values"]["normalised_identity"][i] == pytest.approx(identity, abs=1e-4)
        assert data["classes"][data["columns"]["class"][i]].startswith(score.species)

    def picture(number):
        return read_rgb(out / pages.FOLDER / "thumbnails" / data["pictures"][number])

    target, control = picture(data["columns"]["target"][0]), picture(data["columns"]["control"][0])
    centre = tuple(side // 2 for side in target.shape[:2])
    assert control[centre].max() < 16 < target[centre].max()  # the silhouette is black in the control
    answer = picture(data["columns"]["answer"][0])
    assert np.abs(answer.astype(int) - picture(data["sets"][2]["generated"][0])).mean() < 3  # the ceiling is it


def test_differences_have_the_colour_of_their_size_inside_the_mask_alone():
    target = np.full((30, 40, 3), 100, np.uint8)
    generated = target.copy()
    generated[:, :20] += 50
    generated[:, 20:] += 155
    mask = np.zeros((30, 40), bool)
    mask[5:25, 5:35] = True
    drawn = thumbnails.difference(generated, target, mask)
    assert drawn.shape == (30, 40, 4)
    assert (drawn[..., 3] == np.where(mask, 255, 0)).all()
    colours = thumbnails.scale()
    assert (drawn[10, 10, :3] == colours[round(50 * 255 / thumbnails.FULL_SCALE)]).all()
    assert (drawn[10, 30, :3] == colours[-1]).all()  # beyond the scale
    assert (np.diff(colours @ [0.299, 0.587, 0.114]) > 0).all()  # larger is lighter


def test_thumbnails_are_written_once_and_stale_ones_go(built, tmp_path):
    results, _, _ = built
    out = tmp_path / "out"
    report.write(results, out, gallery=4)
    folder = out / pages.FOLDER / "thumbnails"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    report.write(results, out, gallery=4)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    report.write(results, out, gallery=2)
    fewer = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fewer.items() < times.items()


def test_a_report_beside_the_results_is_the_same_page(built, tmp_path):
    results, _, _ = built
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    report.write(copy, copy, gallery=2)
    report.write(results, tmp_path / "elsewhere", gallery=2)
    for file in ("index.html", f"{pages.FOLDER}/pairs-0.js", f"{pages.FOLDER}/groups.js"):
        assert (copy / file).read_bytes() == (tmp_path / "elsewhere" / file).read_bytes()
    assert "Training" not in (copy / "index.html").read_text()


def test_text_from_the_data_is_escaped(built, tmp_path):
    results, _, _ = built
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    bad = "</script><script>alert(1)</script>"
    for path in (copy / "pairs" / "ellipses").glob("*.csv"):
        path.write_text(path.read_text().replace("Bird 0", bad))
    for name in ("summary", "comparisons", "breakdown", "evaluation"):
        text = (copy / f"{name}.json").read_text().replace('"demo"', '"<script>demo"')
        (copy / f"{name}.json").write_text(text.replace('"rmse"', '"</script><b>"').replace("000000", bad))
    report.write(copy, copy, gallery=14)
    text = (copy / "index.html").read_text()
    assert "<script>alert" not in text and "<script>demo" not in text and "</script><b>" not in text
    Page(text)


def test_missing_inputs_are_named(built, tmp_path):
    results, _, _ = built
    with pytest.raises(UserError, match=r"evaluation\.json: no such file"):
        report.write(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"metrics\.jsonl: found no row"):
        report.write(results, tmp_path / "out", run=tmp_path)
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    about = json.loads((copy / "evaluation.json").read_text())
    about["sets"][0]["model"] = "../../demo"
    (copy / "evaluation.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="expected one without a path"):
        report.write(copy, tmp_path / "out")


def test_evaluations_side_by_side(built, tmp_path):
    results, _, _ = built
    other = tmp_path / "other"
    shutil.copytree(results, other)
    path = other / "pairs" / "ellipses" / "demo.csv"
    worse = [dataclasses.replace(s, rmse=s.rmse + 5) for s in summary.from_csv(path)]
    path.write_text(summary.to_csv(worse))
    found = reading.read({"a": results, "b": other})
    assert found.of_kind("model") == ["untuned", "demo (a)", "demo (b)"]
    assert found.of_kind("reference") == list(verb.REFERENCES)
    (difference,) = [r for r in found.differences if r["baseline"] == "demo (a)" and r["metric"] == "rmse"]
    assert difference["model"] == "demo (b)" and difference["mean"] == pytest.approx(5)
    page = report.write({"a": results, "b": other}, tmp_path / "out", gallery=3)
    assert page.read_text().count("<td>demo (b)</td>") > 1
    assert [s["name"] for s in columns(tmp_path / "out")["sets"]] == [*found.of_kind("model"), "autoencoder-ceiling"]


def test_lines_over_the_models_of_several_evaluations(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(fake_world.register(tmp_path / "installed")))
    fake_world.write_world(tmp_path / "birds")
    folders = {}
    for number, parts in enumerate(((1, 3), (2, 5, 7))):
        pictures = {}
        for share in parts:
            pictures[f"model-{share}"] = tmp_path / f"model-{share}"
            for name in ("x", "y"):
                fake_world.write_pictures(
                    tmp_path / "birds",
                    tmp_path / f"model-{share}" / name,
                    lambda right, sibling, target, mask, n=share: right + n * (sibling - right) / 8,
                )
        out = folders[str(number)] = tmp_path / f"results-{number}"
        verb.evaluate(pictures, {"x": tmp_path / "birds", "y": tmp_path / "birds"}, out, workers=0)
    row = reading.read(folders).regression("x", "y", "normalised_identity")
    assert row["models"] == [f"model-{n}" for n in (1, 3, 2, 5, 7)]
    assert (row["slope"]["mean"], row["r2"]["mean"]) == pytest.approx((1, 1))
    alone = reading.read({"0": folders["0"]}).regression("x", "y", "normalised_identity")
    assert alone["slope"] is None and alone["reason"] == "2 models: a line needs at least 3"


def test_evaluations_of_other_pairs_or_versions_do_not_compare(built, tmp_path):
    results, _, _ = built
    other = tmp_path / "other"
    shutil.copytree(results, other)
    path = other / "pairs" / "ellipses" / "copy-target.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="13 pairs, 13 of them among the 14 of a"):
        reading.read({"a": results, "b": other})
    about = json.loads((other / "evaluation.json").read_text())
    (other / "evaluation.json").write_text(json.dumps(about | {"version": 0}))
    with pytest.raises(UserError, match="other versions|different versions"):
        reading.read({"a": results, "b": other})


def test_the_command_names_folders(tmp_path):
    for name in ("x/report", "y/report", "z"):
        (tmp_path / name).mkdir(parents=True)
    words = [str(tmp_path / "x/report"), str(tmp_path / "y/report"), f"last={tmp_path / 'z'}"]
    assert list(command.named_folders(words)) == ["x/report", "y/report", "last"]
    with pytest.raises(UserError, match="no such folder"):
        command.named_folders([str(tmp_path / "w")])
    with pytest.raises(UserError, match="expected a folder for the report of 2"):
        command.main(words[:2])


def published_results(benchmark):
    """Results of one model whose metrics are the paper's."""
    rows = [
        {"model": "mine", "benchmark": benchmark, "metric": m, "mean": v, "low": None, "high": None, "n": 3}
        for m, v in (("dinov2", 0.5), ("rmse", 60.0))
    ]
    empty = {"folders": {}, "abouts": {}, "breakdown": [], "differences": [], "regressions": [], "scores": {}}
    return reading.Results(**empty, benchmarks={benchmark: {}}, kinds={"mine": "model"}, rows=rows, sets=[])


def test_the_papers_table_says_what_is_not_known():
    text = pages.paper_table(published_results("nabla"))
    lines = re.findall(r'<tr class="published">(.*?)</tr>', text)
    cells = {tuple(row[:2]): row[2:] for row in (re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in lines)}
    assert cells["Om-K", "fill"] == ["0.78", "0.94", "0.060", "51.0"]
    assert cells["Om-K", "depth"] == ["unknown", "unknown", "unknown", "57.0"]
    assert cells["Om-K", "keypoints"] == ["unknown"] * 4
    assert "do not compare" not in text and "60.0" in text
    assert "do not compare" in pages.paper_table(published_results("toy-nabla"))
    assert pages.paper_table(published_results("clips")) == ""


def test_metrics_that_are_not_listed_are_shown_with_their_words():
    assert vocabulary.describe("beak_curvature") == vocabulary.Metric("beak_curvature", "beak curvature", "")
    assert vocabulary.describe("lpips_box").better == "lower"
    assert vocabulary.describe("dinov2_subject").better == ""  # a pasted subject has much of it
    assert all(vocabulary.describe(m).better for m in summary.ALL_METRICS if not m.endswith("_subject"))


def test_labels_of_a_regression_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    points = [
        {
            "name": f"model <{i}>",
            "kind": "model",
            "x": {"mean": v, "low": None, "high": None},
            "y": {"mean": v + 0.01 * i, "low": v - 1, "high": v + 1},
        }
        for i, v in enumerate(rng.normal(size=6))
    ]
    drawn = ElementTree.fromstring(plots.scatter(points, ("a & b", "c"), (1.0, 0.0), (-1.0, 1.0)))
    boxes = [
        (float(t.get("x")), float(t.get("y")), 7.2 * len(t.text))
        for t in drawn.iter("text")
        if t.get("class") == "name"
    ]
    assert len(boxes) >= 4
    for i, (x, y, width) in enumerate(boxes):
        assert all(abs(y - v) >= 14 or x + width <= u or u + w <= x for u, v, w in boxes[:i])
    assert len(list(drawn.iter("circle"))) == 6


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
