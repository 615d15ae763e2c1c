# The two commands of the README, with all their set-up: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the tests want of Debian: a real SLURM, and a browser to look at the report with.
DEBIAN := slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2 chromium
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip would compile one file after another, on one core. What is written for a newer Python does not compile, nor matter.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

.PHONY: demo test chaos lint clean

demo: $(VENV)/demo
	$(BIN)/python data/demo.py demo_data
	DATA_ROOT="$(CURDIR)/demo_data" $(BIN)/python launch/submit.py experiments/demo/stage3_moe.yaml

# Much of it waits for SLURM's own times, so there are more processes than the two cores it was made for.
test: $(VENV)/dev debian
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal $(ARGS)

# More than a hundred faults on a private SLURM, and what comes of it compared to the bit; half an hour and more.
chaos: $(VENV)/dev debian
	$(BIN)/python -m tests.chaos.main $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/demo: constraints.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[demo]'
	$(COMPILE)
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(INSTALL) '.[demo,dev]'
	$(COMPILE)
	touch $@

# The daemons are started by the tests alone, from private folders.
.PHONY: debian
debian:
	@command -v slurmctld >/dev/null && command -v chromium >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null || { \
	    echo "make test: slurmctld or chromium is not here; as root: apt-get install $(DEBIAN)" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null; }

clean:
	rm -rf $(VENV) demo_data runs build *.egg-info
