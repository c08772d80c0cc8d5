# make demo  — train a short run on the embedded world, re-pose birds, evaluate: runs/demo/report/index.html
# make toy-table   — every system of the paper and every step beyond it at toy size: docs/results.md; hours on two cores
# make toy-assets  — every shipped checkpoint from nothing; a day on two cores
# make test  — every test but those of the browser; both install what they need into .venv first
# make test-browser — the report and the page of pairs in a headless Chromium, which apt-get installs where there is none
# make app   — the web app on this machine: http://127.0.0.1:7860 (docs/app.md)
# make fuzz  — a hundred thousand damaged inputs to every reader of outside files; minutes (docs/trust.md)
# make bench-gpu  — the table of targets on a GPU, and PyTorch beside it (docs/performance.md)
# make faults — 220 faults in every verb (kill -9, full disks, damaged checkpoints, ...); nothing may be lost or done twice
# make test-latest — quick tests under the newest releases that pip finds, in .venv-latest, on Python 3.12
# make plan-tpu — the TPU compiler in .venv-tpu, which needs no TPU: python -m nabla_jax.plan then asks it (docs/plan.md)
#
# PYTHON=python3.12    another interpreter (3.11 or newer)
# TORCH_INDEX=URL      a wheel index for torch (the tests compare with it), e.g. one with CPU or CUDA builds
# WORLD_SEED=7         the demo on another world

PYTHON ?= python3
PYTHON312 ?= python3.12
WORLD_SEED ?= 0
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: install app demo toy-table toy-assets test test-browser test-latest faults fuzz lint types bench plan-tpu bench-gpu clean

# Quick tests that need neither torch nor diffusers: golden numbers, models, formulas, configurations, and one small run
# from records through training and pictures to its evaluation.
FAST := tests/golden tests/conditioning/test_diptych.py tests/conditioning/test_masks.py tests/data/test_records.py \
	tests/data/test_pairs.py tests/metrics/test_identity.py tests/metrics/test_statistics.py \
	tests/metrics/test_summary.py tests/models/test_bf16.py tests/models/test_memory.py tests/test_compact.py \
	tests/test_config.py tests/test_plan.py tests/test_plan_flops.py tests/test_reposing.py tests/test_runs.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make: $(PYTHON) is Python %d.%d, nabla_jax needs 3.11 or newer: name another with PYTHON=..." % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[test]'
	@# Without its dependencies: torchvision is large and must match torch; the tests bring their own VGG16.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt lpips
	@touch $@

app: .venv-app/installed
	.venv-app/bin/python -m nabla_jax.app

# An environment of its own over .venv: gradio wants an older Pillow than the tests do.
.venv-app/installed: .venv/installed
	@.venv-app/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-app
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-app/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@grep -v '^pillow==' constraints.txt > .venv-app/constraints.txt
	.venv-app/bin/python -m pip install --quiet -c .venv-app/constraints.txt -e '.[app]'
	@touch $@

demo: install
	@WORLD_SEED=$(WORLD_SEED) PYTHON=$(BIN)/python scripts/demo.sh

toy-table: install
	@$(BIN)/python -m scripts.toy_table --docs docs

toy-assets: install
	@PYTHON=$(BIN)/python bash scripts/toy_assets.sh

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 --ignore=tests/browser

test-browser: .venv-app/installed
	@bash scripts/ensure_chromium.sh
	$(BIN)/python -m pytest tests/browser --durations=5

faults: install
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults --job train --kills 20

fuzz: install
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz --inputs 100000 --seed 0

test-latest: .venv-latest/installed
	.venv-latest/bin/python -m pytest -n 2 --dist worksteal --durations=10 $(FAST)

.venv-latest/installed: pyproject.toml
	@.venv-latest/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON312) -m venv --clear .venv-latest
	@# Without constraints.txt, and without torch: the newest one brings gigabytes of libraries for GPUs.
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e . hypothesis pytest pytest-xdist
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.against_torch --size toy

bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --profile runs/bench-gpu
	$(BIN)/python -m benchmarks.against_torch --size shallow --device cuda --dtype bfloat16 --compile

plan-tpu: .venv-tpu/installed

.venv-tpu/installed: pyproject.toml constraints.txt
	@.venv-tpu/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu]'
	@touch $@
	@echo "the TPU compiler is in .venv-tpu: .venv-tpu/bin/python -m nabla_jax.plan --config configs/omk_keypoints.py --topology v5e:2x4 --mesh fsdp=8 --config.train.batch=8"

clean:
	rm -rf .venv .venv-app .venv-tpu .venv-latest .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info runs/demo data/toybirds* prepared/toybirds*
