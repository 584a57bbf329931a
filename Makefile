# make demo: detect in photographs, then train on drawn shapes.  make test: the tests.  Both need Python 3.10+ alone.
# make voc2012, make voc0712 (GPUS=8): the ResNet-50 recipes, from the download to the table.
# CONSTRAINTS=constraints.txt installs the versions that were tested, PYTHON=python3.12 another Python (after make clean).
PYTHON ?= python3
BIN := .venv/bin

GPUS ?= 1

.PHONY: demo voc2012 voc0712 test test-long lint clean

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, or PYTHON=...")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

install = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.venv/installed: requirements.txt $(CONSTRAINTS) .venv/bin/python
	$(install) -r requirements.txt
	@touch $@

.venv/installed-demo: pyproject.toml .venv/installed
	$(install) -e '.[demo]'
	@touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(install) -e '.[dev]'
	@touch $@

demo: .venv/installed-demo
	$(BIN)/python demo.py

# Stopped, the same command goes on where it was. The table is of the last epoch: the best one was chosen on the same list.
train = $(if $(filter 1,$(GPUS)),$(BIN)/python,$(BIN)/torchrun --nproc-per-node $(GPUS)) train.py --preset $(1) \
	$(if $(wildcard runs/$(1)/config.json),--resume)

voc2012: .venv/installed
	$(BIN)/python create_data_lists.py --download voc2012 --splits train val --out data/voc2012
	$(call train,voc2012)
	$(BIN)/python eval.py runs/voc2012/last.pth.tar --data data/voc2012 --report runs/voc2012/report.html

voc0712: .venv/installed
	$(BIN)/python create_data_lists.py --download voc2007 voc2012 --splits trainval test --out data/voc0712
	$(call train,voc0712)
	$(BIN)/python eval.py runs/voc0712/last.pth.tar --data data/voc0712 --split test --report runs/voc0712/report.html

# A test file a process, and each process one thread: most of the time goes into building networks and starting scripts.
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: .venv/installed-dev
	$(pytest)

test-long: .venv/installed-dev
	$(pytest) -m "long or not long"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy model.py datasets.py utils.py detect.py bulk_detect.py fpnssd/inference fpnssd/evaluation

clean:  # what make made; your data and runs stay
	rm -rf .venv data/synthetic data/synthetic_voc runs/demo
