"""The Snakefile: what it plans, and that what is independent runs side by side."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from urank.files import read_json

ROOT = Path(__file__).parent.parent
FILES = ("experiment.json", "record.json")  # written first and last
RECIPES = "train: {epochs: 0, batch_size: 10}, finetune: {epochs: 0, batch_size: 10}"
ENTRY = f"network: vgg11, dataset: digits10, width: 0.125, data: {{train: 20, test: 10}}, tolerance: 100, {RECIPES}"
PROFILE = f"""experiments:
  - {{{ENTRY}}}
  - {{{ENTRY}, seed: 1}}
  - {{{ENTRY}, variant: eps-0.5, start: digits10/vgg11}}
notebooks: {{}}
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the pipeline needs, with the profile "mine"."""
    for name in ("urank", "book", "data/paper"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text(PROFILE)
    return tmp_path


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", *arguments, "--", "experiments"]
    environment = os.environ | dict(PYTHONPATH=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_plans_each_experiment_after_what_it_starts_from(checkout, executor):
    """As on one machine, so on a cluster."""
    options = "--cores", "8", "--jobs", "8", "--dry-run", "--config", "profile=mine", "threads=3"
    plan = snakemake(checkout, "--executor", executor, *options)
    jobs = re.findall(r"rule experiment:\n    input: (.*)\n    output: (.*)\n(?:    .*\n)*?    threads: (\d+)", plan)
    assert {output: threads for _, output, threads in jobs} == {
        f"runs/mine/digits10/{name}/record.json": "3" for name in ("vgg11", "vgg11-s1", "vgg11@eps-0.5")
    }
    starts = {output: [path for path in inputs.split(", ") if path.startswith("runs/")] for inputs, output, _ in jobs}
    assert starts.pop("runs/mine/digits10/vgg11@eps-0.5/record.json") == ["runs/mine/digits10/vgg11/record.json"]
    assert list(starts.values()) == [[], []]


def test_independent_experiments_run_at_once_on_two_cores(checkout):
    snakemake(checkout, "--cores", "2", "--config", "profile=mine")
    runs = checkout / "runs" / "mine" / "digits10"
    first, second, third = (runs / name for name in ("vgg11", "vgg11-s1", "vgg11@eps-0.5"))
    begun, ended = ({run: (run / file).stat().st_mtime for run in runs.glob("vgg*")} for file in FILES)
    assert max(begun[first], begun[second]) < min(ended[first], ended[second])
    assert ended[first] <= begun[third]
    for run in (first, second, third):
        assert read_json(run / "record.json")["made"]["train"]["device"].endswith(", 1 thread")
