# make demo [VIDEO=path]   segment a video, and say where the results lie
# make space               serve the demo's page for a browser
# make test                run the tests
# make train-smoke         train the paper's three stages in a tiny size: killed, resumed, evaluated, pushed, loaded
# make bench               time and memory on the CPU, beside the peers (about 15 minutes): benchmarks/README.md
# make soak                streams under random commands for 30 minutes; SOAK_ARGS='--minutes 2' for fewer
# make lint                check the style and the types
# PYTHON=... chooses the interpreter (3.10 or newer), VENV=... where the environment goes.

PYTHON ?= python3
VENV ?= .venv
VIDEO ?=
# Pinned and installed first: later requirements then can't swap it for another build.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo space test train-smoke lint bench soak
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-ready
	$(if $(VIDEO),,$(BIN)/python examples/video_from_photo.py demo/astronaut.mp4)
	$(BIN)/ausm segment "$(or $(VIDEO),demo/astronaut.mp4)" --output demo

space: $(VENV)/.space-ready
	$(BIN)/python spaces/app.py

# A worker per core; each takes whole files, whose fixtures are made once.
test: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

train-smoke: $(VENV)/.dev-ready
	$(BIN)/python -m pytest -m slow tests/test_train_smoke.py

soak: $(VENV)/.dev-ready
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

bench: $(VENV)/.dev-ready
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The environment is made once; a change of pyproject.toml makes it anew.
$(VENV)/.torch-ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[sample]"
	touch $@

$(VENV)/.space-ready: $(VENV)/.torch-ready pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/.dev-ready: $(VENV)/.torch-ready pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	# mamba-ssm's reference functions, without its kernels; the tests that compare with them are skipped without it.
	$(BIN)/python -m pip install --quiet setuptools packaging
	# transformers' own test suites, which its wheel leaves out; skipped without them.
	-$(BIN)/python tests/transformers_suite/fetch.py
	-MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
	touch $@
