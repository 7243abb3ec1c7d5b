# Set-up, tests and the main job. Everything installs into .venv; nothing outside the repository is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait spin briefly, then sleep: on a busy machine long spinning makes a training step ten times slower.
export GOMP_SPINCOUNT ?= 3000

.PHONY: install quickstart test test-all test-oldest lint docs clean

install: $(VENV)/.installed

# torch first and bounded: an unbounded requirement would bring gigabytes of CUDA packages.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch>=2.10,<2.14'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,eval,test]'
	touch $@

quickstart: install
	$(BIN)/xlstm-hybrid run recipes/tiny.yaml
	$(BIN)/xlstm-hybrid push runs/tiny/student somebody/tiny-xlstm --dry-run

# One OpenMP thread per worker: tiny models run several times faster than with contended threads.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''

# The oldest transformers that is supported. Left out: what is wrong there for transformers' own models as well.
OLDEST := modeling mixers exact delta joint_mixer identities state conversion families verify compile decode export
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'torch>=2.10,<2.14'
	.venv-oldest/bin/python -m pip install --quiet -e . 'transformers==5.17.0' accelerate pytest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -k 'not longrope-olmo3 and not (hands_back_one and mixed) and not (reset_cache and teacher)' $(OLDEST:%=tests/test_%.py)

# The documents as a site, in site/; a dead link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

lint: install
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) .venv-oldest runs build site *.egg-info src/*.egg-info
