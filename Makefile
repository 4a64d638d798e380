# make demo   the whole pipeline on synthetic music, 6 to 30 minutes on two cores; results/table_demo
# make test   ruff and all tests, about eight minutes
# Both build a virtual environment in $(VENV) first. A demo that was stopped goes on.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=                 # such as --extra-index-url https://download.pytorch.org/whl/cpu
PY = $(VENV)/bin/python

.PHONY: demo test

# the marker is written last: an installation that broke off is made again
$(VENV)/.complete: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt $(PIP_ARGS)
	touch $@

test: $(VENV)/.complete
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

demo: $(VENV)/.complete
	$(PY) prepare_data.py demo
	$(PY) table.py config/table_demo.py
	$(PY) report.py results/table_demo/runs/separator.json
