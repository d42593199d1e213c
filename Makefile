# Two commands are enough: `make demo` and `make test`. Everything happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --no-input --disable-pip-version-check --constraint constraints.txt
FILES := pyproject.toml constraints.txt
comma := ,

CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := PyTorch ($(if $(findstring whl/cpu,$(PIP_EXTRA_INDEX_URL)),200 MB,3 GB; 200 MB with PIP_EXTRA_INDEX_URL=$(CPU_INDEX)))

export ILF_TRT_CACHE ?= build/cache

.PHONY: demo test check fuzz lint format bench clean

# Installs what the argument names; of what pip says, it shows the large downloads, that they are unpacked, and errors.
define install
@rm -f $(VENV)/.failed; { $(PIP) --editable '$(1)' || touch $(VENV)/.failed; } | awk ' \
	/(Downloading|Using cached) .* \([0-9.]+ MB\)$$/ && substr($$(NF - 1), 2) + 0 >= 5 || / GB\)$$/ { print "     ", $$0 } \
	/^Installing collected packages/ { print "      unpacking", NF - 3, "packages" } { fflush() }'
@if rm $(VENV)/.failed 2>/dev/null; then echo "pip failed and says why above; run make again to go on" >&2; false; fi
endef

demo: $(VENV)/.build
	@echo "[3/3] building both demos, and making pictures with them"
	$(BIN)/ilf-trt generate demo-emoji "smiling cat" "green apple" --seed 7 -o build/pictures.png
	$(BIN)/ilf-trt build --checkpoint demo --output build/demo.ilf --force
	$(BIN)/ilf-trt generate build/demo.ilf --labels 0-9 --seed 7 -o build/demo.png
	@if $(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null; then \
		$(BIN)/ilf-trt compile build/demo.ilf --target tensorrt-rtx --gpu sm89,sm120; \
	else \
		echo "no engines: TensorRT-RTX is not installed ($(BIN)/pip install -c constraints.txt -e '.[tensorrt-rtx]')"; \
	fi

test: $(VENV)/.dev
	@echo "[3/3] running the tests: at most 6 minutes on two cores"
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Before every commit, within a minute on two cores: lint, types, and the tests that build nothing.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --quiet --numprocesses logical --maxprocesses 4 --dist loadfile

# The fuzzers and property tests again, with FUZZ examples each and another seed each time.
FUZZ ?= 2000
fuzz: $(VENV)/.dev
	ILF_TRT_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/pytest -m fuzz --numprocesses logical --maxprocesses 4 --dist load

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(call install,.[dev$(comma)bench])
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
	$(BIN)/python -m benchmarks.emoji.poster
	$(BIN)/python -m benchmarks.speed.full_size_build
	$(BIN)/python -m benchmarks.speed.full_size_build --precisions fp8 --models dit-xl-256 pixart-alpha-512
	$(BIN)/python -m benchmarks.speed.roofline
	$(BIN)/python -m benchmarks.overview
	$(BIN)/python -m benchmarks.tables

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); false; }

$(VENV)/.build: $(FILES) | $(BIN)/python
	@echo "[2/3] installing $(TORCH), diffusers, transformers, onnx: some minutes the first time"
	$(call install,.[cpu$(comma)pipeline])
	@touch $@

$(VENV)/.dev: $(FILES) | $(BIN)/python
	@echo "[2/3] installing $(TORCH), diffusers, transformers, onnx, TensorRT-RTX, tools: some minutes the first time"
	$(call install,.[dev])
	@touch $@ $(VENV)/.build
