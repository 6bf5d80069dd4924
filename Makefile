# Every target sets up .venv first, once: again only when pyproject.toml or constraints.txt changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test test-all lab export exercises lint lock clean
export PATH := $(CURDIR)/$(BIN):$(PATH)

run: $(READY)  ## every lesson, end to end
	mlops run

test: $(READY) lint  ## every check and every test
	mlops test

test-all: export MLOPS_LONG = 1
test-all: $(READY) lint  ## the same, with the long tests at full length
	mlops test

lab: $(READY)  ## JupyterLab on the map of the course
	mlops lab

export: $(READY)  ## notebooks cleaned, mlops_lib/ and exercises/ made from them, and the map
	nbdev-clean
	nbdev-clean --fname solutions
	nbdev-export
	mlops exercises release
	mlops index

exercises: $(READY)
	mlops exercises release

lint: $(READY)
	ruff check .
	mypy
	lint-imports
	bandit --quiet --configfile pyproject.toml --recursive mlops_lib --severity-level medium

lock: $(READY)  ## write what is installed to constraints.txt
	pip freeze --all --exclude-editable | sed -E 's/\+cpu//' | grep -viE '^(mlops_lib|-e )' > constraints.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), 'Python 3.11 to 3.13 is needed, this is ' + sys.version"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $(READY)
