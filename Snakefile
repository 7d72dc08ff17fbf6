"""The pipeline: experiment -> notebook -> book, for one profile.

    snakemake --cores all --config profile=quick

An experiment runs once for all notebooks that show it. A killed run resumes where it stopped. Independent experiments
run in parallel with `--cores N` or on a cluster. The target `experiments` makes all records of a profile:

    snakemake --executor slurm --jobs 14 --config profile=cifar threads=8 -- experiments
"""

import sys
from pathlib import Path

import torch

from urank.reproduction.provenance import code_files
from urank.reproduction.profiles import ROOT, load_profile

PROFILE = load_profile(config.get("profile", "quick"))
BUILD = f"build/{PROFILE.name}"
SITE = f"{BUILD}/site"  # input of Jupyter Book: the pages and the executed notebooks
HTML = f"{BUILD}/_build/html"
# Experiments without a dependency share the cores. A GPU runs one experiment at a time. On a cluster, set `threads`.
FIRST = sum(experiment.start is None for experiment in PROFILE.experiments.values())
AT_ONCE = 1 if torch.cuda.is_available() else FIRST
THREADS = int(config.get("threads", max(1, (workflow.cores or 1) // AT_ONCE)))
PYTHON, JUPYTER_BOOK = sys.executable, Path(sys.executable).parent / "jupyter-book"


def files(pattern):
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern)) if path.is_file()]


PAGES = files("book/*")
NUMBERS = files("data/paper/*.csv") + files("data/records/**/*.json") + files("data/benchmarks/*")
CODE = files("urank/**/*.py")
# Changed code makes Snakemake run an experiment again only where its profile recomputes such results.
MEASURING_CODE = [path.relative_to(ROOT).as_posix() for path in code_files()] if PROFILE.recompute_on_code_change else []

# `make book` copies its book to book/_build/html; tests build another one and leave that alone.
TARGET = "book/_build/html/index.html" if config.get("deliver") else f"{HTML}/index.html"


def record(name):
    return f"runs/{PROFILE.name}/{name}/record.json"


def start_record(wildcards):
    """Return the record of the experiment that this one starts from, if any."""
    start = PROFILE.find(wildcards.experiment).start
    return [record(start)] if start else []


localrules:
    all,
    experiments,
    deliver,


rule all:
    input:
        TARGET,


rule experiments:
    input:
        [record(name) for name in PROFILE.experiments],


rule experiment:
    """Run one experiment, or what is left of it. Changed code runs it again only in profiles that ask for that."""
    input:
        MEASURING_CODE,
        f"profiles/{PROFILE.name}.yaml",
        start_record,
    output:
        record("{experiment}"),
    wildcard_constraints:
        experiment="[^/]+/.+",
    threads: THREADS
    log:
        f"{BUILD}/logs/{{experiment}}.log",
    shell:
        "OMP_NUM_THREADS={threads} {PYTHON} -m urank reproduce --profile {PROFILE.name} "
        "--only {wildcards.experiment:q} > {log:q} 2>&1"


rule notebook:
    """Execute one notebook; its page shows the results of exactly this run."""
    input:
        "notebooks/{notebook}.ipynb",
        CODE,
        NUMBERS,
        lambda wildcards: [record(name) for name in PROFILE.notebooks[wildcards.notebook]],
    output:
        f"{SITE}/notebooks/{{notebook}}.ipynb",
    log:
        f"{BUILD}/logs/{{notebook}}.log",
    shell:
        "{PYTHON} -m papermill {input[0]} {output} -p profile {PROFILE.name} --log-output > {log} 2>&1"


rule book:
    """Build every page as HTML; a warning is an error."""
    input:
        PAGES,
        expand(f"{SITE}/notebooks/{{notebook}}.ipynb", notebook=PROFILE.notebooks),
    output:
        f"{HTML}/index.html",
    log:
        f"{BUILD}/logs/book.log",
    shell:
        "rm -rf {SITE}/book && mkdir -p {SITE}/book && cp {PAGES} {SITE}/book && "
        "{PYTHON} -m urank.reproduction.gallery book/intro.md {SITE}/notebooks {SITE}/book/gallery && "
        "{JUPYTER_BOOK} build -W -n --keep-going --config book/_config.yml --toc book/_toc.yml --path-output {BUILD} {SITE} "
        "> {log} 2>&1"


rule deliver:
    input:
        f"{HTML}/index.html",
    output:
        "book/_build/html/index.html",
    params:
        source=HTML,
    shell:
        "rm -rf book/_build/html && mkdir -p book/_build && cp -r {params.source} book/_build/html"
