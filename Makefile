# make demo: draw, train, evaluate, detect.  make test: the tests.  Both need Python 3.10+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long lint clean

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, or PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-app.txt requirements-deploy.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/installed
	$(BIN)/python synthetic.py --out data/synthetic_voc
	$(BIN)/python create_data_lists.py --voc data/synthetic_voc --splits train val --out data/synthetic
	@rm -rf runs/demo  # the last demo's
	$(BIN)/python train.py --preset demo
	$(BIN)/python eval.py runs/demo/best.pth.tar --data data/synthetic --split val --json runs/demo/metrics.json
	$(BIN)/python detect.py data/synthetic_voc/JPEGImages/val_0000[0-5].jpg --checkpoint runs/demo/best.pth.tar
	@echo
	@echo "Look at detected_img/val_0000*.jpg for what it found, runs/demo/metrics.json for the numbers,"
	@echo "runs/demo/log.csv for the training. Next: README.md, 'Your own data in five lines'."

test: .venv/installed-dev
	$(BIN)/python -m pytest -q

test-long: .venv/installed-dev
	$(BIN)/python -m pytest -q -m "long or not long"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  # what make made; your data and runs stay
	rm -rf .venv data/synthetic data/synthetic_voc runs/demo
