PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks

.PHONY: install test demo quality style clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

test: install  ## the default test suite
	$(BIN)/python -m pytest

demo: install  ## draw images with the checkpoint that comes with the package
	$(BIN)/vfmtok generate --seed 0 --output outputs/demo/generated.png
	$(BIN)/vfmtok reconstruct examples/images --output outputs/demo/reconstructed.png

quality: install  ## lint, format and type checks
	$(BIN)/ruff check $(SOURCES) kernel
	$(BIN)/ruff format --check $(SOURCES) kernel
	$(BIN)/mypy

style: install  ## fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES) kernel
	$(BIN)/ruff format $(SOURCES) kernel

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache .mypy_cache
