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
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.speed.cpu
	$(BIN)/python -m benchmarks.study.served_quality
	$(BIN)/python -m benchmarks.speed.training_speed
	$(BIN)/python -m benchmarks.study.trainings --data digits --output build/study/digits
	$(BIN)/python -m benchmarks.study.quality --data digits --trainings build/study/digits
	$(BIN)/python -m benchmarks.study.features --training build/study/digits/tuned
	$(BIN)/python -m benchmarks.study.plots
	$(BIN)/python -m benchmarks.speed.hoisting
	$(BIN)/python -m benchmarks.speed.hoisting --text-gain
	$(BIN)/python -m benchmarks.speed.serving
	$(BIN)/python -m benchmarks.speed.text_export
	$(BIN)/python -m benchmarks.emoji.gallery
	$(BIN)/python -m benchmarks.speed.full_size_build
	$(BIN)/python -m benchmarks.speed.full_size_build --precisions fp8 --models dit-xl-256 pixart-alpha-512
	$(BIN)/python -m benchmarks.tables

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
