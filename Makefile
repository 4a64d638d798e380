# make demo   the whole pipeline on synthetic music: 6 to 9 minutes on two cores; results/table_demo
# make test   ruff and all tests, about five minutes
# Both create a virtual environment in $(VENV) first. An interrupted demo resumes.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=                 # e.g. --extra-index-url https://download.pytorch.org/whl/cpu
PY = $(VENV)/bin/python

.PHONY: demo test

# The markers are touched last, so an interrupted installation is repeated.
define install
$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is required: make PYTHON=python3.12 ...')"
$(PYTHON) -m venv $(VENV)
$(PY) -m pip install -q -r $(1) $(PIP_ARGS)
endef

$(VENV)/.installed: requirements.txt
	$(call install,requirements.txt)
	touch $@

# requirements-dev.txt includes requirements.txt: a demo after the tests installs nothing
$(VENV)/.installed-dev: requirements-dev.txt requirements.txt
	$(call install,requirements-dev.txt)
	touch $(VENV)/.installed $@

test: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

demo: $(VENV)/.installed
	$(PY) prepare_data.py demo
	$(PY) table.py config/table_demo.py
	$(PY) -m reports.figures results/table_demo/runs/separator.json
