# make demo   an image and a prompt become a video, on CPU, with the model in the box
# make test   the whole test suite
# make faults the full counts of the fault tests: kills, cancels, out of memory, limits (ten minutes on two cores)
# make lint   ruff, mypy, import-linter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick faults lint coverage clean

demo: $(STAMP)
	mkdir -p out
	$(BIN)/penstock demo -o out/demo.mp4 --force

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not faults"

faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults tests/engine/run/test_cancel.py -m faults -n auto --dist load -rP

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p penstock
	$(BIN)/mypy --explicit-package-bases --follow-imports silent benchmarks
	$(BIN)/lint-imports

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
