# make demo: train and sample on generated video.  make test: lint and the whole suite.
# Both install into .venv first; set PYTHON to choose the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(VENV)/bin/python -m osp_fast.demo

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m "not alone"
	$(VENV)/bin/python -m pytest -m alone

clean:
	rm -rf $(VENV) build demo tiny
