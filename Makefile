PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?= 0
ROUNDS ?= 30
RUN ?= runs/tiny
BUDGET ?= 10m
OUT ?= runs
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
SANITIZER ?= compute-sanitizer

.PHONY: help demo test gpu-check sanitize fuzz mutants crash soak bench lint clean

help:
	@echo "make demo    train all three stages on the small world, then open $(RUN)/report.html (about 5 minutes)"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make gpu-check    what a GPU alone can tell, within BUDGET=10m: kernels, trainer, full-size steps; a line a test in OUT=runs"
	@echo "make sanitize    the kernels under NVIDIA's compute-sanitizer, on a GPU"
	@echo "make bench   kernels, trainer and, on a GPU, SD3.5's sampler beside their rivals, in 10 minutes (BUDGET=10m); QUICK=1 answers within a minute or two, AGAIN=1 measures again"
	@echo "make fuzz    random inputs for the kernels, 2,000 a test"
	@echo "make mutants    plant faults in the kernels; the tests must find each"
	@echo "make crash   kill a small run again and again; it must end in the same weights (ROUNDS=30)"
	@echo "make soak    2,000 small steps; memory, open files and step time must stay flat, docs/soak.png shows them"
	@echo "make clean   remove what the other targets built; runs/ and data/ stay"

$(STAMP): constraints.txt pyproject.toml kernels/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing into $(VENV); this takes a minute or two"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ./kernels -e '.[train,dev]'
	@touch $@

data/tiny/%/captions.jsonl: | $(STAMP)
	@$(BIN)/uae-fast tiny export $(@D) --split $* --count $(if $(filter train,$*),2048,1024) --seed 0

demo: $(STAMP) data/tiny/train/captions.jsonl data/tiny/heldout/captions.jsonl
	@if test -f $(RUN)/summary.json; then \
		echo "$(RUN) has a finished run, see $(RUN)/report.html; for another one: make demo RUN=runs/again"; \
	elif ls $(RUN)/checkpoints/step-*/manifest.json >/dev/null 2>&1; then \
		$(BIN)/uae-fast train $(RUN)/config.yaml run=$(RUN) --resume; \
	else \
		$(BIN)/uae-fast train tiny run=$(RUN) seed=$(SEED); \
	fi

# A thread for each process: with more, processes wait for each other's
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	@$(BIN)/python -m pytest $(PARALLEL)
	@echo "kernels, interpreted:"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels tests/compat tests/trainer/test_triton_ratio.py

gpu-check: $(STAMP)
	@$(BIN)/python tests/kernels/gpu_check.py --budget $(BUDGET) --out $(OUT)

sanitize: $(STAMP)
	@SANITIZER=$(SANITIZER) $(BIN)/python tests/kernels/sanitize.py

fuzz: $(STAMP)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -k fuzz --hypothesis-profile=fuzz

bench: $(STAMP)
	@$(BIN)/uae-fast bench --budget $(BUDGET) $(if $(QUICK),--quick) $(if $(AGAIN),--again)

mutants: $(STAMP)
	@$(BIN)/python tests/kernels/mutants.py

crash: $(STAMP)
	@$(BIN)/python tests/trainer/crash.py --rounds $(ROUNDS) --seed $(SEED)

soak: $(STAMP)
	@$(BIN)/python tests/trainer/soak.py --steps 2000 --out docs/soak.png

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
