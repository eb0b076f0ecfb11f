# Every target does its own set-up: a virtual environment in .venv, updated when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := --editable '.[models,cluster,dev]'
export MPLBACKEND := Agg
# Idle threads of torch sleep. Spinning threads make training several times slower when other processes run.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-newest selection services real quick bench format clean

demo: $(VENV)/installed
	rm -rf build/demo
	$(BIN)/minecube demo --out build/demo

test: $(VENV)/installed services
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
	$(MAKE) test-newest

# A selection of tests on the newest Python from 3.12 on that pyenv or PATH has. It needs no torch, which is large.
NEWEST := .venv-newest
SELECTED := reader tiles grid day_mosaics composite registration cube pack release_archive release_layout release_import \
  export export_cubes export_cli audit_cli publish process_deaths
SELECTED_NEED := --editable '.[publish]' compliance-checker cryptography hypothesis jsonschema 'moto[server]' odc-stac \
  pytest pytest-socket pytest-xdist rio-cogeo zarr-cm
test-newest: $(VENV)/installed
	@newest=$$($(BIN)/python tests/newest_python.py); if [ -n "$$newest" ]; then \
	  $(MAKE) selection VENV=$(NEWEST) PYTHON="$$newest" PACKAGES="$(SELECTED_NEED)"; \
	fi

selection: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile $(SELECTED:%=tests/test_%.py)

# Postgres with PostGIS for a real STAC API, and a SLURM of one node: tests start both. Debian would start a Postgres of its own at
# installation; the setting in CLUSTERS prevents this.
CLUSTERS := /etc/postgresql-common/createcluster.conf
INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
MAY_INSTALL := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null
services: $(VENV)/installed
	@if ! $(BIN)/python tests/pgstac_server.py 2>/dev/null && $(MAY_INSTALL); then apt-get update -qq && \
	  { [ -e $(CLUSTERS) ] || { $(INSTALL) postgresql-common && sed -i 's/^#* *\(create_main_cluster\).*/\1 = false/' $(CLUSTERS); }; } && \
	  $(INSTALL) postgresql-postgis; \
	fi
	@if ! $(BIN)/python tests/slurm_server.py 2>/dev/null && $(MAY_INSTALL); then apt-get update -qq && \
	  $(INSTALL) slurm-wlm slurmctld slurmd slurm-client munge; \
	fi
	@$(BIN)/python tests/pgstac_server.py || true
	@$(BIN)/python tests/slurm_server.py || true

# The main job on real products, from the folder that MINECUBE_REAL_DATA names (CONTRIBUTING.md).
real: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/test_real_input.py

# All tests but the slow ones.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

# Speed, memory and accuracy next to other tools. Takes an hour and a half on an idle machine.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/composite.py --json build/composite.json --markdown build/performance.md --picture build/mine.png
	$(BIN)/python benchmarks/reading.py --json build/reading.json --plot build/offsets.png
	$(BIN)/python benchmarks/release.py --json build/release.json
	$(BIN)/python benchmarks/windows.py --json build/windows.json
	$(BIN)/python benchmarks/tracks.py --json build/tracks.json
	$(BIN)/python benchmarks/mission.py --json build/mission.json
	$(BIN)/python benchmarks/mixed_reads.py --json build/mixed_reads.json
	$(BIN)/python benchmarks/score.py --json build/score.json
	$(BIN)/python benchmarks/predict.py --json build/predict.json
	$(BIN)/python benchmarks/runs.py --json build/runs.json

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) build dist
