# The six tasks of this project. PY can point at another interpreter: make test PY=python
PY ?= .venv/bin/python

.PHONY: setup fmt check test bench docs

setup:  ## create .venv with everything a developer needs
	python3 -m venv .venv
	$(PY) -m pip install -e ".[dev]"

fmt:    ## format and fix what can be fixed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

check:  ## what CI checks besides the tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test:   ## the whole suite
	$(PY) -m pytest -n 2 --dist worksteal

bench:  ## speed against timm, written to benchmarks/results
	$(PY) benchmarks/speed.py --train

docs:   ## run the code in README.md and docs/
	$(PY) -m pytest tests/test_readme.py
