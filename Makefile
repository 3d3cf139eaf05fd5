# Two commands do everything, set-up included:
#   make demo   environment, synthetic CT-RATE, preparation, encoder -> classification -> localization ->
#               report generation -> joint training: training, evaluation, inference, and the page of a scan
#   make test   environment and the whole test suite
# and, after the demo:
#   make segresnet   MONAI's SegResNet trained on the same cases for the same time, for comparison
#   make attention-unet   the same with AttentionUnet
#   make benchmark   speed and size as ratios against what one would take instead; nothing else should run meanwhile
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo_run
BIN := $(VENV)/bin
ENCODER := bundles/encoder/configs
CLASSIFICATION := bundles/classification/configs
LOCALIZATION := bundles/localization/configs
REPORTS := bundles/report_generation/configs
MULTITASK := bundles/multitask/configs
OVERLAYS := bundles/_overlays
# stages at a time, each on one thread
DEMO_JOBS ?= 2
# a chest CT of your own, for the demo's last step; NIfTI
REAL_CT ?= $(firstword $(wildcard ../shared/data/ct_chest/*/ct.nii.gz))
# as wide as lets it make as many steps as the localizer in about the same time
SEGRESNET = --demo_dir $(abspath $(DEMO)) --run_dir $(abspath $(DEMO))/localization_segresnet --segresnet_filters 8
# as many steps as the localizer in about the same time; with its own 64 to 512 channels they would take hours
ATTENTION_UNET = --demo_dir $(abspath $(DEMO)) --run_dir $(abspath $(DEMO))/localization_attention_unet --attention_unet_channels "[8, 16, 32, 64]"
RUN := $(BIN)/python -m monai.bundle run
export MLFLOW_DISABLE_TELEMETRY := true
# one thread per process is the fastest and steadiest where two processes share two cores
PYTEST_WORKERS ?= 2

STAGES := data encoder encoder-evaluate features text-encoder language-model classification classification-evaluate \
	localization localization-evaluate reports reports-evaluate reports-rl multitask multitask-evaluate scans summary

.PHONY: help env demo segresnet attention-unet benchmark test check clean $(STAGES:%=demo-%)

help:
	@sed -n '2,9s/^# *//p' Makefile

env: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# The demo's stages as a graph: after the encoder two run side by side, each on one thread, which such small networks
# use best.
demo: env
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j $(DEMO_JOBS) demo-summary

demo-data:
	$(BIN)/python -m data_prep.synthesize --output $(DEMO)/raw --num-train-patients 360 --num-valid-patients 80 --size 48 112 112 --seed 1
	$(BIN)/python -m data_prep.prepare --source $(DEMO)/raw --output $(DEMO)/prepared --spatial-size 32 96 96 --window lung soft_tissue --validation-fraction 0.15

# nothing can be done beside it but what its own threads do better
demo-encoder: demo-data
	OMP_NUM_THREADS=$(DEMO_JOBS) $(RUN) --config_file "['$(ENCODER)/train.json','$(OVERLAYS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-encoder-evaluate: demo-encoder
	$(RUN) --config_file "['$(ENCODER)/train.json','$(ENCODER)/evaluate.json','$(OVERLAYS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-features: demo-encoder
	$(RUN) --workflow_type infer --config_file "['$(ENCODER)/inference.json','$(OVERLAYS)/demo.json']" --demo_dir $(abspath $(DEMO))
	$(RUN) --workflow_type infer --config_file "['$(ENCODER)/inference.json','$(OVERLAYS)/demo.json']" --demo_dir $(abspath $(DEMO)) \
		--use_anatomical_mask False --output_dir $(abspath $(DEMO))/encoder/features_without_mask

demo-text-encoder: demo-encoder
	$(BIN)/python -m data_prep.make_text_encoder --reports $(DEMO)/prepared/manifest.json --output $(DEMO)/text_encoder --overwrite

# after the features, so that the localizer, which takes longest, begins first
demo-language-model: demo-features
	$(BIN)/python -m data_prep.make_language_model --reports $(DEMO)/prepared/manifest.json --output $(DEMO)/language_model --threads 1 --overwrite

demo-classification: demo-features demo-text-encoder
	$(RUN) --config_file "['$(CLASSIFICATION)/train.json','$(CLASSIFICATION)/from_features.json','$(OVERLAYS)/demo.json','$(CLASSIFICATION)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-classification-evaluate: demo-classification
	$(RUN) --config_file "['$(CLASSIFICATION)/train.json','$(CLASSIFICATION)/evaluate.json','$(OVERLAYS)/demo.json','$(CLASSIFICATION)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))
	$(RUN) --workflow_type infer --config_file "['$(CLASSIFICATION)/inference.json','$(OVERLAYS)/demo.json','$(CLASSIFICATION)/demo.json']" --demo_dir $(abspath $(DEMO))
	$(BIN)/python -m vlm3d_ext.engines.challenge_classification_score --predictions $(DEMO)/classification/predictions/tables/challenge_classification.json \
		--labels $(DEMO)/raw/multi_abnormality_labels/valid_predicted_labels.csv --training-labels $(DEMO)/raw/multi_abnormality_labels/train_predicted_labels.csv

demo-localization: demo-encoder demo-text-encoder
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-localization-evaluate: demo-localization
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(LOCALIZATION)/evaluate.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))
	$(RUN) --workflow_type infer --config_file "['$(LOCALIZATION)/inference.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json']" --demo_dir $(abspath $(DEMO)) \
		--montages True --max_cases 16

demo-reports: demo-localization demo-classification demo-language-model
	$(RUN) --config_file "['$(REPORTS)/train.json','$(OVERLAYS)/demo.json','$(REPORTS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-reports-evaluate: demo-reports
	$(RUN) --config_file "['$(REPORTS)/train.json','$(REPORTS)/evaluate.json','$(OVERLAYS)/demo.json','$(REPORTS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

# the joint network begins from the aligned report generator and needs nothing of what is reinforced beside it
demo-reports-rl: demo-reports demo-reports-evaluate
	$(RUN) --config_file "['$(REPORTS)/train.json','$(REPORTS)/train_rl.json','$(OVERLAYS)/demo.json','$(REPORTS)/demo.json','$(REPORTS)/demo_rl.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))
	$(RUN) --config_file "['$(REPORTS)/train.json','$(REPORTS)/evaluate.json','$(OVERLAYS)/demo.json','$(REPORTS)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO)) \
		--ckpt_dir $(abspath $(DEMO))/report_generation/models_rl --output_dir $(abspath $(DEMO))/report_generation/eval_rl
	$(RUN) --workflow_type infer --config_file "['$(REPORTS)/inference.json','$(OVERLAYS)/demo.json','$(REPORTS)/demo.json']" --demo_dir $(abspath $(DEMO)) \
		--ckpt_dir $(abspath $(DEMO))/report_generation/models_rl --max_cases 8

demo-multitask: demo-reports
	$(RUN) --config_file "['$(MULTITASK)/train.json','$(OVERLAYS)/demo.json','$(MULTITASK)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

demo-multitask-evaluate: demo-multitask demo-reports-evaluate demo-localization-evaluate demo-classification-evaluate
	$(RUN) --config_file "['$(MULTITASK)/train.json','$(MULTITASK)/evaluate.json','$(OVERLAYS)/demo.json','$(MULTITASK)/demo.json','$(OVERLAYS)/tracking.json']" --demo_dir $(abspath $(DEMO))

# one scan in, everything out: a phantom that no network was trained on and, where there is one, a real chest CT
demo-scans: demo-multitask
	mkdir -p $(DEMO)/scans
	ln -sfn $(abspath $(DEMO))/raw/valid_fixed/valid_10/valid_10_a/valid_10_a_1.nii.gz $(DEMO)/scans/phantom.nii.gz
	$(if $(REAL_CT),ln -sfn $(abspath $(REAL_CT)) $(DEMO)/scans/real_ct.nii.gz,@echo "no real CT: name one with REAL_CT=my_chest_ct.nii.gz")
	$(RUN) --workflow_type infer --config_file "['$(MULTITASK)/inference.json','$(OVERLAYS)/demo.json','$(MULTITASK)/demo.json']" --demo_dir $(abspath $(DEMO)) \
		--scan $(abspath $(DEMO))/scans

demo-summary: demo-multitask-evaluate demo-scans demo-reports-rl demo-encoder-evaluate
	$(BIN)/python -m vlm3d_ext.run_summary $(DEMO)

segresnet: env
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(LOCALIZATION)/segresnet.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json']" $(SEGRESNET)
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(LOCALIZATION)/segresnet.json','$(LOCALIZATION)/evaluate.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json']" $(SEGRESNET)
	$(BIN)/python -m vlm3d_ext.run_summary $(DEMO)

attention-unet: env
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(LOCALIZATION)/segresnet.json','$(LOCALIZATION)/attention_unet.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json']" $(ATTENTION_UNET)
	$(RUN) --config_file "['$(LOCALIZATION)/train.json','$(LOCALIZATION)/segresnet.json','$(LOCALIZATION)/attention_unet.json','$(LOCALIZATION)/evaluate.json','$(OVERLAYS)/demo.json','$(LOCALIZATION)/demo.json']" $(ATTENTION_UNET)
	$(BIN)/python -m vlm3d_ext.run_summary $(DEMO)

benchmark: env
	$(BIN)/python -m benchmarks

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vlm3d_ext data_prep benchmarks
	$(MAKE) test

clean:
	rm -rf $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
