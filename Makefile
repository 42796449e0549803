# make demo and make test each work as the only command on a fresh machine: they make .venv first.
# Set PYTHON to choose an interpreter, APT=no to have nothing installed by apt-get.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := build/installed
STAMP := $(VENV)/installed
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
SECONDS ?= 600
SEED ?= 1
STATES ?=
SLICES ?=
RESULTS ?=
REPLAY ?=
RUNS ?= 5
GIB ?= 2
OPERATION ?= commit
KILLS ?= 200
SIZE ?= 1G
LINES ?= 5000
ONLY ?=
FORMAT ?=
CASES ?=
PROGRAM ?=
PACKAGES := cli drivers journal ops recovery

.PHONY: help demo test lint bench crash-soak mutations kill-soak fault-soak conformance differential clean

help:
	@echo "make demo        a commit killed twice: rolled back, then finished; two minutes at most"
	@echo "make test        all tests"
	@echo "make lint        ruff, and mypy --strict"
	@echo "make bench       safeimg against qemu-img: RUNS=$(RUNS) GIB=$(GIB) (of the disk) ONLY= (work) RESULTS=FILE"
	@echo "make crash-soak  simulated power cuts: SECONDS=$(SECONDS) SEED=$(SEED) JOBS=$(JOBS) STATES= (enough) SLICES= (of each) ONLY= RESULTS=FILE REPLAY=STATE"
	@echo "make mutations   the power-cut simulation on a protocol with deliberate faults: it has to catch each"
	@echo "make kill-soak   real commands killed: OPERATION=$(OPERATION) KILLS=$(KILLS) SIZE=$(SIZE) SEED=$(SEED)"
	@echo "make fault-soak  each call of commits fails: of simulated ones, then of real ones (strace): JOBS=$(JOBS)"
	@echo "make conformance QEMU's own tests with safeimg as qemu-img: FORMAT= (all) CASES= (all) JOBS=$(JOBS) PROGRAM= (safeimg)"
	@echo "make differential  generated command lines, qemu-img's outcome against safeimg's: LINES=$(LINES) SEED=$(SEED) ONLY= (commands)"
	@echo "make clean       removes what these made"

$(STAMP): pyproject.toml .ci/setup
	@.ci/setup
	@touch $@

demo: $(STAMP)
	@$(BIN)/python bench/demo.py

# No test may take more than five minutes.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --timeout 300

# mypy does not follow editable installs of packages that lie elsewhere: it reads them through links.
lint: $(STAMP)
	@mkdir -p build/dev/safeimg
	@for package in $(PACKAGES); do ln -sfn ../../../$$package build/dev/safeimg/$$package; done
	$(BIN)/ruff check .
	MYPYPATH=build/dev $(BIN)/mypy $(addprefix -p safeimg.,$(PACKAGES))

# As users install it: what finds the modules of an editable install takes as long to start as the interpreter.
bench: $(STAMP)
	@test -d $(INSTALLED) || $(BIN)/python -m venv $(INSTALLED)
	@$(INSTALLED)/bin/python -m pip install --quiet --disable-pip-version-check --compile .
	@$(INSTALLED)/bin/python bench/speed.py --runs $(RUNS) --gib $(GIB) --only "$(ONLY)" $(addprefix --json ,$(RESULTS))

crash-soak: $(STAMP)
	cd tests && ../$(BIN)/python -m powercut.soak --seconds $(SECONDS) --seed $(SEED) --jobs $(JOBS) $(addprefix --states ,$(STATES)) \
		$(addprefix --slices ,$(SLICES)) --only "$(ONLY)" $(addprefix --json ,$(abspath $(RESULTS))) $(if $(REPLAY),--replay "$(REPLAY)")

mutations: $(STAMP)
	cd tests && ../$(BIN)/python -m powercut.mutations --jobs $(JOBS)

kill-soak: $(STAMP)
	cd tests && ../$(BIN)/python -m kills.soak --operation $(OPERATION) --kills $(KILLS) --seed $(SEED) --size $(SIZE)

fault-soak: $(STAMP)
	cd tests && ../$(BIN)/python -m faults.soak --jobs $(JOBS)
	cd tests && ../$(BIN)/python -m faults.calls_soak --base base.raw && ../$(BIN)/python -m faults.calls_soak

conformance: $(STAMP)
	@cd tests && ../$(BIN)/python -m conformance.run --jobs $(JOBS) --format "$(FORMAT)" --cases "$(CASES)" \
		$(addprefix --program ,$(PROGRAM))

differential: $(STAMP)
	@cd tests && PYTHONPATH=cli ../$(BIN)/python -m differential.soak --lines $(LINES) --seed $(SEED) --commands "$(ONLY)"

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
