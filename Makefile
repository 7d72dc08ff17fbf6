# The doors. `make book` and `make test` need Python 3.11 or later and make, and nothing else.
PYTHON ?= python3
PROFILE ?= quick
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --cores all --rerun-incomplete --quiet progress rules host

.PHONY: book test bench lab clean

book: .venv/ready  ## run the notebooks of PROFILE and build the book
	@$(SNAKEMAKE) --config profile=$(PROFILE) deliver=yes
	@echo "The book is built: open $(CURDIR)/book/_build/html/index.html"

test: .venv/ready  ## every test: the package, the notebooks twice, the book with warnings as errors
	$(BIN)/ruff check .
	@$(SNAKEMAKE) --config profile=smoke
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg tests build/smoke/site/notebooks

bench: .venv/ready  ## the naive way against this package's, side by side, as ratios
	$(BIN)/python -m benchmarks.speed

lab: .venv/ready  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=. notebooks/figure1_spectra.ipynb

book/figure1.png: data/records/cifar10/vgg11.json urank/reproduction/figures/spectra.py  ## the picture of the first page
	$(BIN)/python -c 'from urank.reproduction import figures, profiles; \
	  figures.spectra(*profiles.recorded("cifar10/vgg11")).savefig("$@", dpi=130)'

clean:  ## delete what was built and what live runs left; keeps .venv and data
	rm -rf build book/_build runs .snakemake

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "urank needs Python 3.11 or later; set PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
