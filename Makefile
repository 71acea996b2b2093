# `make run` answers a question with the model in this folder; `make test` passes the tests. Both set up what they need.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
QUESTION ?= What is 48 + 27?

# Two workers with one thread each are faster on small models than one worker with two.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(PY) -m pytest

.PHONY: help run test test-slow test-transformers test-matrix test-newest test-mutation test-vllm lint format bench clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

# torch comes first and alone: its build is chosen by the machine's index, and nothing later may replace it.
$(VENV)/.run: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable ".[test]"
	touch $@

run: $(VENV)/.run  ## answer QUESTION with the embedded model
	$(PY) generate.py "$(QUESTION)"

test: $(VENV)/.test  ## the fast tests
	$(PYTEST) -n 2 --dist loadfile

test-slow: $(VENV)/.test  ## the slow tests
	$(PYTEST) -n 2 --dist loadfile -m slow

test-transformers: $(VENV)/.test  ## transformers' own model tests on our classes (TRANSFORMERS_SRC=checkout for more)
	$(TEST_ENV) $(PY) -m tests.transformers_suite $(SUITE_OPTIONS) $(if $(TRANSFORMERS_SRC),--transformers-src $(TRANSFORMERS_SRC))
	$(TEST_ENV) $(PY) -m tests.transformers_suite.tokenizer $(if $(TRANSFORMERS_SRC),--transformers-src $(TRANSFORMERS_SRC))

test-matrix: $(VENV)/.test  ## the core tests on every supported transformers, torch, Python (VERSIONS="4.57.6 5.24.0/2.15.0" for some)
	$(TEST_ENV) $(PY) -m tests.matrix $(VERSIONS)

test-newest: $(VENV)/.test  ## the core tests on the newest transformers and torch, where they are newer than constraints.txt
	$(TEST_ENV) $(PY) -m tests.matrix.newest

test-mutation: $(VENV)/.test  ## plant defects in the core, one at a time, and list those that no test tells
	$(TEST_ENV) $(PY) -m tests.mutation

# vLLM for processors, in an environment of its own: 2 minutes and 3.5 GB. The builds of torchvision, torchaudio,
# torchcodec and triton that it asks for do not import beside a torch for processors, and are not needed.
$(VLLM_VENV)/.vllm: serving/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --constraint serving/constraints.txt torch
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --constraint serving/constraints.txt \
	    --editable "serving[cpu,test]"
	$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

test-vllm: $(VLLM_VENV)/.vllm  ## the vLLM plug-in on a real vLLM
	$(TEST_ENV) $(VLLM_PY) -m pytest serving/tests

lint: $(VENV)/.test  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.test  ## ruff, mending
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.test  ## time us beside transformers' own class, two minutes
	$(PY) -m benchmarks.compare --quick

clean:  ## remove the environments
	rm -rf $(VENV) $(VLLM_VENV)
