# `make demo` and `make test` need only Python 3.10 or newer, pip and make; the rest builds on them.
# Another interpreter: make PYTHON=python3.12 demo. Another folder for the environment: make VENV=/some/where demo.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
FUZZ ?= 1000
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --constraint constraints.txt
DEMO_TEXTS := "a red apple" "a picture of a blue heart" "红苹果" "猫脸"
# Makes PyTorch compute on any x86 processor as on one with AVX2 and without instructions for half precision.
PLAIN := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
ON_PLAIN := tests/parity $(addprefix tests/test_,attention.py transformer.py coglm.py sampling.py super_resolution.py \
	upsampling.py pipeline.py cli_train.py) $(wildcard tests/test_scale_*.py tests/test_training_*.py \
	tests/test_checkpoints_*.py) notebooks/04_coglm.ipynb notebooks/10_from_toy_to_6b.ipynb
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval_sanitize.cfg

.PHONY: help demo test test-plain fuzz lint types notebooks wheel-check clean

help:
	@echo "make demo         install into $(VENV) and draw a few pictures into demo/"
	@echo "make test         install into $(VENV) and run all tests, notebooks included"
	@echo "make test-plain   the tests that depend on the processor, as on one without bfloat16 instructions"
	@echo "make fuzz         the readers of weights with random files, for some minutes; more with FUZZ=10000"
	@echo "make lint         ruff"
	@echo "make types        mypy"
	@echo "make notebooks    run all notebooks again and keep their outputs"
	@echo "make wheel-check  build the wheel, install it elsewhere, draw a picture there"
	@echo "make clean        remove what the commands above made, except $(VENV)"

# Stamps: a step runs again only when its inputs are newer than the file that it touched last.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python %d.%d is too old: minicogview needs 3.10 or newer; try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.plain: pyproject.toml constraints.txt $(VENV)/.made
	@echo "Installing minicogview into $(VENV): a few hundred MB the first time"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.made
	@echo "Installing minicogview and its development tools into $(VENV): a few hundred MB the first time"
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $(VENV)/.plain $@

demo: $(VENV)/.plain
	$(VENV)/bin/minicogview generate $(DEMO_TEXTS) --n 4 --seed 0 --out demo --overwrite
	@echo "The pictures are in $(CURDIR)/demo"

# One thread a process: two workers with two threads each would wait for one another on two cores.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=10 --doctest-modules $(NBVAL) \
		$(wildcard notebooks) minicogview tests

test-plain: export OMP_NUM_THREADS = 1
test-plain: $(VENV)/.dev
	$(PLAIN) $(PY) -m pytest -n $(WORKERS) --dist loadfile --durations=10 $(NBVAL) $(ON_PLAIN)

fuzz: export OMP_NUM_THREADS = 1
fuzz: export MINICOGVIEW_FUZZ = $(FUZZ)
fuzz: $(VENV)/.dev
	$(PY) -m pytest tests/test_checkpoints_fuzz.py

lint: $(VENV)/.dev
	$(PY) -m ruff check .

types: $(VENV)/.dev
	$(PY) -m mypy

notebooks: export OMP_NUM_THREADS = 1
notebooks: $(VENV)/.dev
	$(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
		--ExecutePreprocessor.timeout=300 notebooks/*.ipynb

wheel-check: $(VENV)/.dev
	.ci/wheel-check $(PY)

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
