# `make book` and `make test` need Python 3.11 or later and make, and nothing else.
PYTHON ?= python3
PROFILE ?= quick
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --cores all --rerun-incomplete --quiet progress rules host
# One thread per process: processes that compete for the cores with several threads each are many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: book test bench lab clean

book: .venv/ready  ## run the notebooks of PROFILE and build the book
	@$(SNAKEMAKE) --config profile=$(PROFILE) deliver=yes
	@echo "The book is built: open $(CURDIR)/book/_build/html/index.html"

test: .venv/ready  ## style, types, every test, the book with warnings as errors, and again each notebook that computes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	@$(SNAKEMAKE) --config profile=smoke
	$(PYTEST) --dist worksteal --cov --cov-report term-missing:skip-covered --cov-fail-under 95 tests
	$(PYTEST) --dist loadfile --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg \
	  $$(grep -l "import torch" build/smoke/site/notebooks/*.ipynb)

bench: .venv/ready  ## compare the speed of the package with a naive implementation
	$(BIN)/python -m benchmarks.speed

lab: .venv/ready  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=. notebooks/walkthrough.ipynb

book/figure1.png: data/records/cifar10/vgg11.json urank/reproduction/figures/spectra.py  ## the figure in README.md
	$(BIN)/python -c 'from urank.reproduction import figures, profiles; \
	  figures.spectra(*profiles.recorded("cifar10/vgg11")).savefig("$@", dpi=130)'

OVERVIEW := book/mlu.svg book/full_rank.svg
$(OVERVIEW): $(wildcard data/records/cifar*/*.json) data/paper/table3_cifar.csv urank/reproduction/figures/overview.py  ## the figures in book/intro.md
	$(BIN)/python -c 'from urank.reproduction.figures import overview; overview.save("$@")'

book/method.svg: urank/reproduction/figures/method_picture.py urank/subspaces.py  ## the figure in book/method.md
	$(BIN)/python -c 'from urank.reproduction.figures import method_picture; method_picture.save("$@")'

clean:  ## delete builds and live runs; keep .venv and data
	rm -rf build book/_build runs .snakemake

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "urank needs Python 3.11 or later; set PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
