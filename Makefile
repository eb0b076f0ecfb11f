# Both targets do all their own set-up: a virtual environment in .venv, made anew when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MPLBACKEND := Agg
# torch's threads would spin while they wait; beside other processes that makes training several times slower.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test services real quick bench format clean

demo: $(VENV)/installed
	rm -rf build/demo
	$(BIN)/minecube demo --out build/demo

test: $(VENV)/installed services
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# What a real STAC API needs beside Python: Postgres with PostGIS. The tests start a server of their own; Debian would set one
# up that runs on, which it is told not to where it has none yet.
CLUSTERS := /etc/postgresql-common/createcluster.conf
services: $(VENV)/installed
	@if ! $(BIN)/python tests/pgstac_server.py 2>/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  install="apt-get install -y -qq --no-install-recommends"; export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && \
	  { [ -e $(CLUSTERS) ] || { $$install postgresql-common && sed -i 's/^#* *\(create_main_cluster\).*/\1 = false/' $(CLUSTERS); }; } && \
	  $$install postgresql-postgis; \
	fi
	@$(BIN)/python tests/pgstac_server.py || true

# The main job on real products (an openEO extract, an Earth Search scene), where they lie in ../shared/data.
real: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/test_real_input.py

# Everything but the tests that take minutes.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

# What composites cost and how good they are; reading far away, from servers in trouble, and with flags that are wrong; the
# published release imported; windows for training; mapping, smoothing,
# scoring: an hour and a half on a machine that does nothing else.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/composite.py --json build/composite.json --markdown build/performance.md --picture build/mine.png
	$(BIN)/python benchmarks/reading.py --json build/reading.json --plot build/offsets.png
	$(BIN)/python benchmarks/release.py --json build/release.json
	$(BIN)/python benchmarks/windows.py --json build/windows.json
	$(BIN)/python benchmarks/tracks.py --json build/tracks.json
	$(BIN)/python benchmarks/score.py --json build/score.json
	$(BIN)/python benchmarks/predict.py --json build/predict.json

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[models,cluster,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
