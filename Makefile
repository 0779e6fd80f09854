# `make demo` and `make test` need nothing but Python >= 3.11: the first run makes .venv and installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000

.PHONY: install dev demo test test-slow lint types tests format bench compare family switch-family architectures clean

# What the package needs to run. torch is pinned in constraints.txt to a build without CUDA; for a GPU see the README.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/polymoe/kernels/*.cpp src/polymoe/kernels/*.h)
	$(PYTHON) -c 'import sys; sys.exit("polymoe needs Python 3.11 or newer; run: make PYTHON=python3.12 " + "$(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -e . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

install: $(VENV)/.installed

dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/polymoe demo --port $(PORT)

test: lint types tests

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

tests: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m "not slow"

# Simulations of the scheduler's policies over long traces.
test-slow: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m slow

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The benchmarks of docs/benchmarks.md; options in BENCH, for example make bench BENCH="--shape tiny".
bench: install
	$(BIN)/polymoe bench throughput $(BENCH)

# polymoe beside vLLM on the CPU (installed in .venv-vllm) and transformers' generate; options in COMPARE.
compare: install
	$(BIN)/python benchmarks/compare/run.py $(COMPARE)

# Train the demo family again (about an hour on 4 cores) from a folder of texts; see src/polymoe/demo/MODEL_CARD.md.
family: dev
	$(BIN)/python tools/train_demo_family.py --corpus $(CORPUS) --out src/polymoe/demo/family

# Train a small Switch Transformers family (about 45 minutes on a core) from the same texts; see docs/merging.md.
switch-family: dev
	$(BIN)/python tools/train_switch_family.py --corpus $(CORPUS) --out $(or $(OUT),switch-family)

# Try every architecture of transformers' experts registry with tiny random checkpoints, then time packed experts against
# stored ones in small bfloat16 families of those that are served (docs/architectures.md).
architectures: dev
	OMP_NUM_THREADS=1 $(BIN)/python tools/try_architectures.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/time_architectures.py --out docs/architectures.md

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache
