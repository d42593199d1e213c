# Two commands are enough: `make demo` and `make test`. Everything happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FILES := pyproject.toml constraints.txt

export ILF_TRT_CACHE ?= build/cache

.PHONY: demo test lint format bench clean

demo: $(VENV)/.build
	$(BIN)/ilf-trt generate demo-emoji "smiling cat" "green apple" --seed 7 -o build/pictures.png
	$(BIN)/ilf-trt build --checkpoint demo --output build/demo.ilf --force
	$(BIN)/ilf-trt generate build/demo.ilf --labels 0-9 --seed 7 -o build/demo.png
	@if $(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null; then \
		$(BIN)/ilf-trt compile build/demo.ilf --target tensorrt-rtx --gpu sm89,sm120; \
	else \
		echo "no engines: TensorRT-RTX is not installed ($(BIN)/pip install -c constraints.txt -e '.[tensorrt-rtx]')"; \
	fi

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/served.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/trainings.py --data digits --output build/study/digits
	$(BIN)/python benchmarks/quality.py --data digits --trainings build/study/digits
	$(BIN)/python benchmarks/features.py --training build/study/digits/tuned
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python benchmarks/hoisting.py
	$(BIN)/python benchmarks/hoisting.py --text-gain
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/text_export.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/build.py --precisions fp8 --models dit-xl-256 pixart-alpha-512
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: $(FILES) | $(BIN)/python
	$(PIP) --editable '.[pipeline]'
	touch $@

$(VENV)/.dev: $(FILES) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.build
