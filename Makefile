# The commands of the README. Everything they need is installed by `scripts/setup`.
.PHONY: help setup programs kernels demo test check unit bench lab-down clean
.DEFAULT_GOAL := help

BIN := .venv/bin

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install what is missing, build the BPF programs
	@scripts/setup

demo: setup ## the whole system on this machine: lab, encryption, traffic, a capture (root)
	@$(BIN)/python scripts/demo.py

check: setup ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup ## tests that need no root and no lab
	$(BIN)/pytest -m "not bpf and not netns and not lab and not vm"

# Tests and measurements run without a way out of this machine: what they take from the network comes before. The
# emulated machines get a run of their own: the lab of the others, idle but up, would take a good part of their time.
programs: setup
	@$(BIN)/meshwire lab programs

kernels: setup
	@$(BIN)/python -m tests.vm.kernel

test: check programs kernels ## everything: unit, BPF, namespaces, lab, virtual machines with stock kernels (root)
	scripts/own-namespaces $(BIN)/pytest --ignore=tests/vm
	scripts/own-namespaces $(BIN)/pytest tests/vm

bench: programs ## the figures, as a table and in bench/results/latest.json (root)
	$(BIN)/python -m bench

# Each node's wireguard-go gets one thread at a time: three nodes share this machine.
soak: programs ## hours of rotations, restarts, upgrades, outages and a storm of faults, under traffic (root)
	mkdir -p .build
	GOMAXPROCS=1 MESHWIRE_SOAK=1 MESHWIRE_QUARANTINES=20 MESHWIRE_SOAK_RESULTS=$(CURDIR)/.build/soak.json \
	scripts/own-namespaces $(BIN)/pytest -s --timeout=0 tests/lab/test_soak.py tests/lab/test_quarantine.py

lab-down: ## take the lab down
	@$(BIN)/meshwire lab down

clean: ## remove what was built here; caches in ~/.cache/meshwire stay
	$(MAKE) -C bpf clean
	rm -rf .venv .build .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/results
