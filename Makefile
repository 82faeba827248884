# make demo   complete PROMPT with three servers on this machine:  PROMPT="A list is" make demo
# make test   lint and run all tests
# make faults run the tests of faults and hostile input in full, and print what each fault did
# make lint   ruff and mypy only
# make simulate-faults SEEDS=10000 FIRST_SEED=0
#             inject faults into so many simulated swarms, and print the seeds of violations;
#             OPTIONS="--servers 3:6 --faults crash cut=2 lie" says of what kind (--help lists all)
# make venv   create .venv with everything the other targets need
#
# Needs Python 3.11 or newer; name another one with  make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1000
FIRST_SEED ?= 0
READY := $(VENV)/.ready
INSTALL_LOG := $(VENV)/install.log

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test faults simulate-faults lint venv clean

demo: $(READY)
	@$(BIN)/python -m planetserve.demo

test: lint
	$(BIN)/python -m pytest

faults: $(READY)
	$(BIN)/python -m pytest -m 'faults or not faults' tests/faults

simulate-faults: $(READY)
	$(BIN)/python scripts/simulate_faults.py --seeds $(SEEDS) --first-seed $(FIRST_SEED) $(OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(READY)

# Redone when a requirement changes; the package itself is installed in place, from src.
# --no-compile: compiling every file of every package ahead of use takes minutes.
# pip says hundreds of lines, which are kept in the log and shown only as a count, or on failure.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing PlanetServe and what it needs into $(VENV); the first time this takes minutes"
	@$(BIN)/python scripts/quietly.py $(INSTALL_LOG) -- \
	  $(BIN)/python -m pip install --no-compile --progress-bar off --constraint constraints.txt \
	  --editable '.[dev,gateway,nsga2,plot,quant,simulation]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
