# Everything runs in .venv, which the first target that needs it makes from the system's python3.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART_ARGS ?=

.PHONY: help install quickstart test check coverage format soak bench quality docs clean

help:
	@echo "make quickstart   train a small model offline (5 minutes) and chat with it"
	@echo "make test         the test suite"
	@echo "make check        lint, format and types"
	@echo "make coverage     lines and branches that the tests reach, by floor"
	@echo "make soak         the long tests, alone: half an hour"
	@echo "make bench        training and decoding speed beside transformers"
	@echo "make quality      bits per byte against training time beside transformers (half an hour)"
	@echo "make docs         regenerate docs/settings.md"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "niels-gpt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/niels-gpt quickstart $(QUICKSTART_ARGS)

test: install
	$(BIN)/pytest -n 3 --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/audit_config_coverage.py
	$(BIN)/python -m niels_gpt.settings.doc --check

coverage: install
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 3 --dist loadfile
	$(BIN)/coverage combine -q
	$(BIN)/python -m tests.floor_coverage

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: install
	$(BIN)/pytest --soak -m soak -n 2

bench: install
	$(BIN)/python tools/bench_train.py
	$(BIN)/python tools/bench_decode.py

quality: install
	$(BIN)/python tools/bench_quality.py --minutes 5
	$(BIN)/python tools/bench_quality.py --minutes 15 --peer-lr best

docs: install
	$(BIN)/python -m niels_gpt.settings.doc

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
