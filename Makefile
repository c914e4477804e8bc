# Every target first makes .venv with the exact versions in constraints.txt. Needs Python 3.11 or newer, make and a package registry.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready

export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
export JUPYTER_PLATFORM_DIRS ?= 1

.PHONY: help run test lab check bench data

help: ## what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmbench needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## the whole chain on the embedded town: about five minutes on two cores, ends with the path of a report
	@$(BIN)/llmbench run

test: $(READY) ## every check of notebooks, parity, learning, faults and browser
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

lab: $(READY) ## open the course in JupyterLab
	@$(BIN)/llmbench lab

check: $(READY) ## notebooks and package in sync, cleaned and linted
	@$(BIN)/python tests/check.py

bench: $(READY) ## side-by-side measurements (minutes; wants a quiet machine)
	@for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

data: $(READY) ## rebuild the embedded data and small checkpoints, and check their sums
	@$(BIN)/python data/make_town.py
