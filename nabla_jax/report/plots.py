"""Plots as inline SVG text: no library, colours from the page's CSS variables, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LABEL_WIDTH, ROW, PLOT_WIDTH = 150, 22, 300


def intervals(rows: Sequence[dict[str, Any]], kinds: Sequence[str], marks: Sequence[float] = ()) -> str:
    """One line per row: the mean as a dot, its interval as a bar, the model's name at the left.

    `rows` are summary rows of one benchmark and metric, `kinds` a CSS class per row ('model', 'bound' or
    'reference'); a row without an interval (low None) is a dot alone; `marks` are values drawn as dashed
    verticals, such as chance.
    """
    rows = [_with_ends(row) for row in rows]
    ends = [v for r in rows for v in (r["low"], r["high"], r["mean"])] + list(marks)
    ticks = nice_ticks(min(ends), max(ends))
    low, high = min(ticks[0], *ends), max(ticks[-1], *ends)
    height = len(rows) * ROW + 30
    label_width = min(max(LABEL_WIDTH, 20 + 7 * max(len(r["model"]) for r in rows)), 2 * LABEL_WIDTH)

    def x(value: float) -> float:
        return label_width + (value - low) / (high - low) * PLOT_WIDTH

    # As text a screen reader gets the table; the plot repeats it.
    parts = [
        f'<svg class="plot" viewBox="0 0 {label_width + PLOT_WIDTH + 20} {height}" role="img" aria-label="intervals">'
    ]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for mark in marks:
        parts.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="4" y2="{height - 24}"/>')
    for i, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        y = 4 + ROW * (i + 0.5)
        title = f"{row['model']}: {row['mean']:.4g} [{row['low']:.4g}, {row['high']:.4g}], n = {row['n']}"
        parts.append(
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<text class="name" x="{label_width - 10}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(row['model'])}</text>"
            f'<line class="bar" x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x(row["mean"]):.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
    return "".join(parts) + "</svg>"


def _with_ends(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose interval is its mean where it has none."""
    return {**row} if row["low"] is not None else {**row, "low": row["mean"], "high": row["mean"]}


def scatter(
    points: Sequence[dict[str, Any]],
    labels: tuple[str, str],
    line: tuple[float, float] | None,
    fitted: tuple[float, float],
) -> str:
    """Means of models on two benchmarks as a cross of their intervals each.

    `points` hold name, kind ('model', 'bound' or 'reference'), x and y (summary rows); `labels` name the axes; `line`
    is (slope, intercept), drawn dashed over the stretch `fitted` of x.
    """
    width, height, left, bottom = 420, 330, 54, 46
    points = [{**p, "x": _with_ends(p["x"]), "y": _with_ends(p["y"])} for p in points]
    ends = {a: [p[a][k] for p in points for k in ("low", "high", "mean")] for a in "xy"}
    ticks = {a: nice_ticks(min(ends[a]), max(ends[a])) for a in "xy"}
    low = {a: min(ticks[a][0], *ends[a]) for a in "xy"}
    span = {a: max(ticks[a][-1], *ends[a]) - low[a] for a in "xy"}

    def x(value: float) -> float:
        return left + (value - low["x"]) / span["x"] * (width - left - 16)

    def y(value: float) -> float:
        return 10 + (1 - (value - low["y"]) / span["y"]) * (height - bottom - 10)

    name = escape(f"{labels[1]} against {labels[0]}")
    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">']
    for tick in ticks["x"]:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="10" y2="{height - bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in ticks["y"]:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 16}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (height - bottom + 10) / 2
    parts.append(
        f'<text class="axis" x="{(width + left) / 2}" y="{height - 8}" text-anchor="middle">{escape(labels[0])}</text>'
        f'<text class="axis" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
        f"{escape(labels[1])}</text>"
    )
    if line is not None:
        (a, b), (start, stop) = line, fitted
        parts.append(
            f'<line class="mark" x1="{x(start):.1f}" y1="{y(a * start + b):.1f}" '
            f'x2="{x(stop):.1f}" y2="{y(a * stop + b):.1f}"/>'
        )
    centres = [(x(p["x"]["mean"]), y(p["y"]["mean"])) for p in points]
    taken = [(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in centres]
    # Models choose their places first; a reference point that finds none has its name in its tooltip alone.
    rank = {"model": 0, "bound": 1, "reference": 2}
    for point, (cx, cy) in sorted(zip(points, centres, strict=True), key=lambda item: rank[item[0]["kind"]]):
        h, v = point["x"], point["y"]
        title = f"{point['name']}: {h['mean']:.4g} on {labels[0]}, {v['mean']:.4g} on {labels[1]}"
        parts.append(
            f'<g class="{point["kind"]}"><title>{escape(title)}</title>'
            f'<line class="bar thin" x1="{x(h["low"]):.1f}" x2="{x(h["high"]):.1f}" y1="{cy:.1f}" y2="{cy:.1f}"/>'
            f'<line class="bar thin" x1="{cx:.1f}" x2="{cx:.1f}" y1="{y(v["low"]):.1f}" y2="{y(v["high"]):.1f}"/>'
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>'
        )
        place = _free_place(cx, cy, 7.2 * len(point["name"]), taken, (left, 2, width, height - bottom))
        if place is not None:
            taken.append(place)
            parts.append(f'<text class="name" x="{place[0]:.1f}" y="{place[3] - 3:.1f}">{escape(point["name"])}</text>')
        parts.append("</g>")
    return "".join(parts) + "</svg>"


Box = tuple[float, float, float, float]


def _free_place(cx: float, cy: float, width: float, taken: Sequence[Box], frame: Box) -> Box | None:
    """(left, top, right, bottom) of a label beside a point, inside the frame and off what is taken."""
    for dy in (-7, 7, -18, 18, -30, 30):
        for x in (cx + 8, cx - 8 - width):
            box = (x, cy + dy - 7, x + width, cy + dy + 7)
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            apart = all(box[2] <= t[0] or t[2] <= box[0] or box[3] <= t[1] or t[3] <= box[1] for t in taken)
            if inside and apart:
                return box
    return None


def curve(steps: Sequence[float], values: Sequence[float], label: str = "loss") -> str:
    """Values over steps: every point faintly, and their running mean over a twentieth of the run."""
    width, height, left, bottom = 860, 260, 56, 34
    half = len(values) // 40
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    smooth = [sum(span) / len(span) for span in spans]
    # A single spike must not flatten the curve: the axis covers 99 % of the points and all of the mean.
    top = max(*smooth, sorted(values)[int(0.99 * (len(values) - 1))]) if len(values) > 1 else values[0]
    ticks, across = nice_ticks(min(values), top), nice_ticks(min(steps), max(steps), 8)
    low, high = min(ticks[0], *values), max(ticks[-1], top)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def point(step: float, value: float) -> str:
        x = left + (step - first) / (last - first) * (width - left - 14)
        y = 10 + (high - min(value, high)) / (high - low) * (height - bottom - 10)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg class="plot curve" viewBox="0 0 {width} {height}" role="img"><title>{escape(label)}</title>']
    for tick in ticks:
        y = point(first, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in across:
        if first <= tick <= last:
            x = point(tick, high).split(",")[0]
            parts.append(f'<text class="tick" x="{x}" y="{height - 12}" text-anchor="middle">{tick:g}</text>')
    for name, series in (("raw", values), ("smooth", smooth)):
        points = " ".join(point(s, v) for s, v in zip(steps, series, strict=True))
        parts.append(f'<polyline class="{name}" points="{points}"/>')
    return "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else max(abs(low), 1.0)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(start, max(stop, start + 1) + 1)]
