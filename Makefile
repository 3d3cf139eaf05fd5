# Two commands do everything, set-up included:
#   make demo   environment, synthetic CT-RATE, preparation, encoder: training, evaluation, inference
#   make test   environment and the whole test suite
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo_run
BIN := $(VENV)/bin
ENCODER := bundles/encoder/configs
OVERLAYS := bundles/_overlays
export MLFLOW_DISABLE_TELEMETRY := true
# one thread per process is the fastest and steadiest where two processes share two cores
PYTEST_WORKERS ?= 2

.PHONY: help env demo test check clean

help:
	@sed -n '2,3s/^# *//p' Makefile

env: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: env
	$(BIN)/python -m data_prep.synthesize --output $(DEMO)/raw --num-train-patients 360 --num-valid-patients 80 --size 48 112 112 --seed 1
	$(BIN)/python -m data_prep.prepare --source $(DEMO)/raw --output $(DEMO)/prepared --spatial-size 32 96 96 --window lung soft_tissue --validation-fraction 0.15
	$(BIN)/python -m monai.bundle run --config_file "['$(ENCODER)/train.json','$(OVERLAYS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))
	$(BIN)/python -m monai.bundle run --config_file "['$(ENCODER)/train.json','$(ENCODER)/evaluate.json','$(OVERLAYS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))
	$(BIN)/python -m monai.bundle run --workflow_type infer --config_file "['$(ENCODER)/inference.json','$(OVERLAYS)/demo.json']" --demo_dir $(abspath $(DEMO))
	$(BIN)/python -m vlm3d_ext.run_summary $(DEMO)

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vlm3d_ext data_prep
	$(MAKE) test

clean:
	rm -rf $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
