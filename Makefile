# `make demo` and `make test` are all a newcomer needs; both make .venv when it is not there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# CI adds what compiles the CUDA kernels without a device, and training: dev,nvrtc,train
EXTRAS ?= dev

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/triage demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamp is written last, so a half-made environment is made again.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard triage/*/*.c triage/*/*.h)
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(STAMP)

clean:
	rm -rf .venv build demo-out *.egg-info
