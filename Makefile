# Three commands for a machine that has Python >= 3.11, make and a package registry:
#   make quickstart   train a small point transformer plain and with EWA, fuse it, compare
#   make test         run the tests
#   make reliability  kill, damage and resume for some minutes, and print what was tried and survived
# All create the virtual environment VENV (default .venv) with the versions pinned in constraints.txt.
VENV    ?= .venv
PYTHON  ?= python3
WORKERS ?= 2

# The stamp names the dependency files' content and this checkout: when either changes, the install step runs again.
KEY   := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' -)-$(shell pwd | cksum | tr ' ' -)
STAMP := $(VENV)/.ewa3d-$(KEY)
BIN   := $(VENV)/bin

.PHONY: env quickstart test reliability lint
env: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ewa3d needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + "; choose another with PYTHON=")'
	@# python without pip: an earlier attempt stopped midway (no ensurepip, say), so create it again (in place: nothing is deleted)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> creating the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing ewa3d with the versions pinned in constraints.txt (torch is large: minutes, and some GB on disk, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.ewa3d-*
	@touch $@

quickstart: $(STAMP)
	@echo "==> running the quickstart (at most 5 minutes on 2 CPU cores)"
	@$(BIN)/python -m ewa3d.quickstart $(ARGS)

test: $(STAMP)
	@echo "==> running the tests in $(WORKERS) processes, one thread each"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

reliability: $(STAMP)
	@echo "==> killing, damaging and resuming (one process, one thread)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m 'reliability or not reliability' $(ARGS) tests/reliability

lint: $(STAMP)
	@echo "==> ruff"
	@$(BIN)/ruff check .
