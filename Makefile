# Two commands are enough: `make demo` and `make test`. Everything happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FILES := pyproject.toml constraints.txt

.PHONY: demo test lint format bench clean

demo: $(VENV)/.build
	$(BIN)/ilf-trt build --checkpoint demo --output build/demo.ilf --force
	$(BIN)/ilf-trt generate build/demo.ilf --labels 0-9 --seed 7 -o build/demo.png

test: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: $(FILES) | $(BIN)/python
	$(PIP) --editable '.[build]'
	touch $@

$(VENV)/.dev: $(FILES) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.build
