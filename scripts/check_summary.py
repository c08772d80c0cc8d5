"""Checks a demo's summary.json: is it complete, and does it show what the demo is to show?

python scripts/check_summary.py runs/demo/report/summary.json
"""

import itertools
import json
import math
import sys
from pathlib import Path

MODELS = (
    "untuned",
    "demo",
    "toy-omk-fill",
    "autoencoder-ceiling",
    "flat-colour",
    "copy-target",
    "paste-subject",
    "same-class",
    "sibling-class",
)
BENCHMARKS = ("toy-nabla", "toy-inat-unseen")
METRICS = ("rmse", "ssim", "normalised_identity", "subject_effect", "identification_rate")
FIELDS = ("model", "benchmark", "metric", "mean", "low", "high", "n")


def problems(rows: list[dict]) -> list[str]:
    found = {}
    out = []
    for row in rows:
        missing = [field for field in FIELDS if field not in row]
        if missing:
            out.append(f"row without {', '.join(missing)}: {row}")
            continue
        found[row["model"], row["benchmark"], row["metric"]] = row
    for key in itertools.product(MODELS, BENCHMARKS, METRICS):
        row = found.get(key)
        if row is None:
            out.append("no row for " + ", ".join(key))
        elif not (row["n"] > 0 and all(math.isfinite(row[f]) for f in ("mean", "low", "high"))):
            out.append(f"not a finite estimate: {row}")
        elif not row["low"] <= row["mean"] <= row["high"]:
            out.append(f"the mean lies outside its interval: {row}")
    return out


def claims(rows: list[dict]) -> dict[str, bool]:
    """What the demo is to show on each benchmark, and whether it does."""
    out = {}
    for benchmark in BENCHMARKS:
        row = {(r["model"], r["metric"]): r for r in rows if r["benchmark"] == benchmark}

        def mean(model: str, metric: str, row: dict = row) -> float:
            return row[model, metric]["mean"]

        def apart(model: str, metric: str, row: dict = row) -> bool:
            return row[model, metric]["low"] > row["untuned", metric]["high"]

        shipped, rmse = "toy-omk-fill", mean("toy-omk-fill", "rmse")
        found = {
            "the shipped adapter's RMSE is at least 29 % below the untuned base's": rmse
            <= 0.71 * mean("untuned", "rmse"),
            "its subject effect is at least 0.05": mean(shipped, "subject_effect") >= 0.05,
            "its subject effect is above the untuned base's, intervals apart": apart(shipped, "subject_effect"),
            "its identification rate is above the untuned base's, intervals apart": apart(
                shipped, "identification_rate"
            ),
            "its normalised identity is above flat colour's": mean(shipped, "normalised_identity")
            > mean("flat-colour", "normalised_identity"),
            "the short run's RMSE is below the untuned base's, intervals apart": row["demo", "rmse"]["high"]
            < row["untuned", "rmse"]["low"],
            "the short run's subject effect is above zero": row["demo", "subject_effect"]["low"] > 0,
        }
        for other in ("paste-subject", "same-class", "sibling-class"):
            found[f"the shipped adapter's RMSE is below {other}'s"] = rmse < mean(other, "rmse")
        out.update({f"{benchmark}: {claim}": holds for claim, holds in found.items()})
    return out


if __name__ == "__main__":
    summary = Path(sys.argv[1])
    rows = json.loads(summary.read_text())
    lines = problems(rows)
    if not lines:
        lines = [f"not shown: {claim}" for claim, holds in claims(rows).items() if not holds]
    if lines:
        sys.exit(f"{summary}: {len(lines)} problems\n" + "\n".join(lines))
    size = f"{len(MODELS)} models x {len(BENCHMARKS)} benchmarks x {len(METRICS)} metrics"
    print(f"{summary}: {size}, complete; all claims hold")
