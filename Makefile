# make demo     trains and scores two methods and says where to look
# make test     everything that is tested: the notebooks, then tests/
# make reports  what is absent or stale in reports/, made again from records without training
# make lab      JupyterLab on the notebooks
# make docs     notebooks, reference and cards as a site in site/, with search; opens without a server
# make check    is the tree what export, clean and the README script make of it?
# make dist     source distribution and wheel in dist/
# make clean    forget the environment
PYTHON ?= python3
BIN := .venv/bin
# notebooks and tests run side by side, one thread each; a worker keeps the tests of a file together (they share what they prepare) and takes over half of another's rest
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test notebooks pytest reports check lab docs dist clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# the environment is remade only when what it is made from changes
.venv/.installed: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "spectralmoe needs Python 3.10 or later; found `$(PYTHON) --version`. Name another: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (spectralmoe)" >/dev/null
	touch $@

install: .venv/.installed

demo: install
	$(BIN)/spectralmoe demo $(DEMO_FLAGS)

test: install notebooks pytest

notebooks: install
	SPECTRALMOE_RUNS="$$(mktemp -d)" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(TEST_WORKERS) --timing

pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal tests

reports: install
	$(BIN)/spectralmoe reports $(REPORT_FLAGS)

check: install
	$(BIN)/python tests/check_tree.py

lab: install
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

# nothing is asked of a network once the extra is installed
.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	$(BIN)/python docs/make_site.py site

dist: install
	$(BIN)/python -m build

clean:
	rm -rf .venv
