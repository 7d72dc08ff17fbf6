"""The Snakefile: the jobs that it plans, and which of them may run at the same time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        (
            ["--executor", "local", "--cores", "6", "--config"],
            "3",
        ),  # two experiments without a dependency share the cores
        (["--executor", "slurm", "--cores", "8", "--jobs", "8", "--config", "threads=3"], "3"),
    ],
)
def test_plans_each_experiment_after_what_it_starts_from(checkout, options, threads):
    plan = snakemake(checkout, "--dry-run", *options, "profile=mine")
    jobs = re.findall(r"rule experiment:\n    input: (.*)\n    output: (.*)\n(?:    .*\n)*?    threads: (\d+)", plan)
    assert {output: planned for _, output, planned in jobs} == {
        f"runs/mine/digits10/{name}/record.json": threads for name in ("vgg11", "vgg11-s1", "vgg11@eps-0.5")
    }
    starts = {output: [path for path in inputs.split(", ") if path.startswith("runs/")] for inputs, output, _ in jobs}
    assert starts.pop("runs/mine/digits10/vgg11@eps-0.5/record.json") == ["runs/mine/digits10/vgg11/record.json"]
    assert list(starts.values()) == [[], []]
