# One word each; `make help` lists them.
PYTHON ?= python3
PY := .venv/bin/python
SEED ?= 0
SEEDS ?= 1000
SEED0 ?= 1
KILLS ?= 1000
GROUPS ?= 100000
FORM ?= user
EVENTS ?= 100
# Two files of tests at a time, in order: the long ones come early. Those on clusters come last, since
# they wait more than they compute.
AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
ifndef RUN
# The first name that no earlier demo has taken: demo-0, demo-0-2, demo-0-3, ...
RUN := $(shell n=demo-$(SEED); r=$$n; i=2; \
    while [ -e runs/$$r ] || [ -e runs/$$r-sft ]; do r=$$n-$$i; i=$$((i+1)); done; echo $$r)
endif
DEMO_SET := --set run.seed=$(SEED) --set run.name=$(RUN)

.PHONY: help setup demo test test-full check lint fmt golden bench bench-peer bench-kernels bench-learner bench-dispatch bench-buffer chaos campaign slurm-install slurm-up slurm-demo slurm-down chaos-slurm clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

setup:  ## .venv with the tested versions; a second run does nothing
	@PYTHON=$(PYTHON) bash requirements/setup.sh

demo: setup  ## data, base model and 20 steps of DAPO on this machine; SEED=1 for another one
	rm -rf data/demo
	.venv/bin/dapo demo-data data/demo --seed $(SEED)
	.venv/bin/dapo sft configs/demo.toml $(DEMO_SET)
	.venv/bin/dapo train configs/demo.toml $(DEMO_SET)

lint:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: setup lint  ## lint, types and the fast tests
	$(PY) -m pytest tests/unit tests/golden tests/kernels -m "not slow and not full" $(AT_ONCE)

test: setup lint  ## lint, types and every test but the longest
	$(PY) -m pytest tests -m "not full and not slurm" $(AT_ONCE)
	$(PY) -m pytest tests/slurm -m "not full" $(AT_ONCE)

test-full: setup lint  ## every test
	$(PY) -m pytest tests -m "not slurm" $(AT_ONCE)
	$(PY) -m pytest tests/slurm

fmt:  ## rewrite the sources in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

golden: setup  ## rewrite the records that tests/golden compares with
	$(PY) -m tests.golden.rewrite

bench: setup  ## what a step of the demo costs
	$(PY) perf/bench_demo.py

bench-peer: setup  ## the same, with TRL beside it (in .venv-peer)
	@bash perf/setup_peer.sh
	$(PY) perf/bench_demo.py --peer trl

bench-kernels: setup  ## the kernels beside their peers, 9 minutes on a GPU
	@PYTHON=$(PY) bash perf/setup_kernel_peers.sh
	$(PY) perf/run_all.py --minutes 9

bench-learner: setup  ## a step of the learner in each layout, beside a plain step
	$(PY) perf/bench_learner.py

bench-dispatch: setup  ## how fast a batch is filled, simulated beside other policies and oracles
	$(PY) perf/sim_dispatch.py

bench-buffer: setup  ## what the buffer takes in, beside HTTPS alone and the disk alone
	$(PY) perf/bench_buffer.py

chaos: setup  ## the buffer in SEEDS simulated worlds full of faults, from SEED0 on
	$(PY) -m tests.chaos.run --seeds $(SEEDS) --seed0 $(SEED0)

campaign: setup  ## KILLS real SIGKILLs while GROUPS groups go through real processes
	$(PY) -m tests.campaign.run --kills $(KILLS) --groups $(GROUPS) --actors 50 --batch 256

slurm-install:  ## Slurm from Debian's packages, as root; starts no service
	@bash slurm/mini/install.sh

slurm-up:  ## a real Slurm of four nodes on this machine; FORM=root for nodes that can lose power
	@$(PYTHON) -m slurm.mini up --form $(FORM)

slurm-demo: setup  ## the demo as Slurm jobs, on a cluster of its own; SEED=1 for another one
	@bash slurm/mini/demo.sh $(SEED) $(RUN)

chaos-slurm: setup  ## EVENTS random faults on a real Slurm in one run, and how long each takes to heal
	$(PY) -m tests.slurm.chaos_run --events $(EVENTS) --seed $(SEED)

slurm-down:  ## stop it and remove all of it, also what a crash left
	@$(PYTHON) -m slurm.mini down

clean:  ## caches and build products; runs, data and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find dapo_hpc kernels tests perf -name __pycache__ -type d -prune -exec rm -rf {} +
