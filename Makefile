# make demo   the whole pipeline on synthetic music, about ten minutes on two cores; outputs in ckpt/, results/
# make test   ruff and all tests, about six minutes
# Both build a virtual environment in $(VENV) first. The demo replaces what an earlier demo wrote.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=                 # such as --extra-index-url https://download.pytorch.org/whl/cpu
SEEDS = 1 2 3
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
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

demo: $(VENV)/.complete
	$(PY) prepare_data.py demo
	$(PY) pretrain_sep.py config/demo_sep.py --overwrite=True
	for seed in $(SEEDS); do \
		$(PY) finetune_cls.py config/demo_tags.py config/tail.py --seed=$$seed --out=ckpt/demo_tail-seed$$seed.pt --overwrite=True && \
		$(PY) finetune_cls.py config/demo_tags.py config/scratch.py --seed=$$seed --out=ckpt/demo_scratch-seed$$seed.pt --overwrite=True && \
		$(PY) finetune_cls.py config/demo_tags.py --init=ckpt/demo_sep.pt --unet_lr=0.1 --seed=$$seed --out=ckpt/demo_pretrained-seed$$seed.pt --overwrite=True \
		|| exit 1; \
	done
	$(PY) eval.py ckpt/demo_sep.pt --overwrite=True
	$(PY) eval.py ckpt/demo_tail-seed?.pt ckpt/demo_scratch-seed?.pt ckpt/demo_pretrained-seed?.pt --name=demo --overwrite=True
