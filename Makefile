# Both targets do all their own set-up: a virtual environment in .venv, made anew when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MPLBACKEND := Agg
# torch's threads would spin while they wait; beside other processes that makes training several times slower.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test real quick format clean

demo: $(VENV)/installed
	rm -rf build/demo
	$(BIN)/minecube demo --out build/demo

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# The main job on real products (an openEO extract, an Earth Search scene), where they lie in ../shared/data.
real: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/test_real_input.py

# Everything but the tests that take minutes.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,cluster,publish,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
