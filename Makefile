# make demo   from nothing to a trained model that writes text, on two CPU cores in minutes
# make test   the whole test suite
# make check  format, lint and types, as CI runs them

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE := config/recipes/demo.yaml

.PHONY: demo test check format

demo: $(VENV)/.installed
	$(BIN)/python data/download_datasets.py --config $(RECIPE)
	$(BIN)/python data/tokenizer.py --config $(RECIPE)
	$(BIN)/python data/preprocess.py --config $(RECIPE)
	$(BIN)/python scripts/train.py --config $(RECIPE)
	$(BIN)/python scripts/eval.py --config $(RECIPE)
	$(BIN)/python scripts/eval.py --config $(RECIPE) --tasks quern
	$(BIN)/python scripts/generate.py --config $(RECIPE) --prompt "The future of AI is"
	$(BIN)/python scripts/report.py --config $(RECIPE)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/

check: $(VENV)/.installed-dev
	$(BIN)/black --check .
	$(BIN)/isort --check .
	$(BIN)/flake8 .
	$(BIN)/mypy .

format: $(VENV)/.installed-dev
	$(BIN)/black .
	$(BIN)/isort .

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('Quern needs Python 3.11 or newer; choose one with make PYTHON=...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
