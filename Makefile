# `make demo` and `make test` are all that a fresh machine needs; the rest is for daily work.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo serve test test-all lint format bench gpu-check protos clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/peftserve demo

serve: setup
	$(BIN)/peftserve serve $(ARGS)

test: setup model
	$(BIN)/pytest $(ARGS)

test-all: setup model
	$(BIN)/pytest -m 'not gpu' $(ARGS)

# The embedded model, once; tests on it and the demo share the copy.
.PHONY: model
model: setup
	$(BIN)/peftserve model pull

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup model
	$(BIN)/python bench/run.py $(ARGS)

# On a machine with a card: are the kernels right there, and how fast?
gpu-check: setup model
	$(BIN)/python bench/gpu_check.py $(ARGS)

protos: setup
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
