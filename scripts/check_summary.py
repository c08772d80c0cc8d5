"""Checks that a summary.json holds one finite row for every model, benchmark and metric of the demo."""

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


if __name__ == "__main__":
    summary = Path(sys.argv[1])
    lines = problems(json.loads(summary.read_text()))
    if lines:
        sys.exit(f"{summary}: {len(lines)} problems\n" + "\n".join(lines))
    print(f"{summary}: {len(MODELS)} models x {len(BENCHMARKS)} benchmarks x {len(METRICS)} metrics, complete")
