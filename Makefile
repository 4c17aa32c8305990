# `make demo` and `make test` do all set-up themselves; both can be run again without downloading anything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-all test-comfyui docs lint types bench tables evidence clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "genattn needs Python 3.10 to 3.13, got $$($(PYTHON) --version); try: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "the venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }

# torch goes first and alone: through the constraints it takes the build that the machine offers, not the largest one
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,train]'
	@touch $@

# the test matrix runs beside them; kept out of `demo`, because diffusers imports torchao, and torchao talks, whenever it is there
$(VENV)/.quantizers: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[quantizers]'
	@touch $@

demo: install
	$(BIN)/genattn generate --prompt "a red circle moves right on a dark background" --compare-dense --out out/demo.mp4

# in a ComfyUI that is there already: COMFYUI_DIR holds main.py, COMFYUI_PYTHON is its Python and sees this package
COMFYUI_PYTHON ?= $(if $(COMFYUI_DIR),$(COMFYUI_DIR)/venv/bin/python)
test test-all test-comfyui: export COMFYUI_DIR := $(COMFYUI_DIR)
test test-all test-comfyui: export COMFYUI_PYTHON := $(COMFYUI_PYTHON)

# a worker per core, up to eight (each takes 1 to 2 GB), with one thread each; a file's tests stay together and in order
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile
test test-all: export OMP_NUM_THREADS := 1

test: install $(VENV)/.quantizers
	@test -n "$(COMFYUI_DIR)" || echo "no real ComfyUI is met, for COMFYUI_DIR is not set; stand-ins are"
	$(PYTEST)

test-all: install $(VENV)/.quantizers
	$(PYTEST) -m "slow or not slow"

test-comfyui: install
	@test -f "$(COMFYUI_DIR)/main.py" || { echo "COMFYUI_DIR must be a ComfyUI, a folder with main.py; got '$(COMFYUI_DIR)'"; exit 2; }
	@$(COMFYUI_PYTHON) -c 'import genattn' || { echo "$(COMFYUI_PYTHON) must see genattn: $(COMFYUI_PYTHON) -m pip install --no-deps -e ."; exit 2; }
	$(BIN)/python -m pytest -q tests/apps/comfyui

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	@# mypy cannot follow the folder map, so it is shown the package as a wheel would hold it
	@rm -rf build/types && mkdir -p build/types/genattn
	@ln -s $(CURDIR)/genattn/* $(CURDIR)/kernels $(CURDIR)/guidance $(CURDIR)/pipelines $(CURDIR)/apps build/types/genattn/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p genattn

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m genattn.apps.pages.site.build --out build/site

bench: install
	$(BIN)/genattn bench attention --quick

tables: install
	$(BIN)/python -m genattn.apps.pages.readme_parts

evidence: install
	$(BIN)/genattn evidence

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
