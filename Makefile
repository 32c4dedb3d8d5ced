# Two commands do everything: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint tools clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/fedward-sim datasets fetch breast-cancer
	$(BIN)/fedward-sim run breast-cancer --sites sites/breast-cancer --exact-metrics --seed 1 --repeat 5

# Servers of the deployment tests want the machine for themselves; the others share it.
test: $(READY) tools lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not deployment and not namespace"
	$(BIN)/python -m pytest -m "deployment or namespace"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the deployment tests need from the system: nginx and PostgreSQL (Debian's packages).
tools:
	PATH=$$PATH:/usr/sbin command -v nginx > /dev/null || (apt-get update -qq && apt-get install -y -qq nginx-light)
	ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || (apt-get update -qq && apt-get install -y -qq postgresql)

clean:
	rm -rf runs sites tables audit .pytest_cache .mypy_cache .ruff_cache
