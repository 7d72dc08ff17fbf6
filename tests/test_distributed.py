import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from urank import distributed
from urank.files import read_json, read_weights
from urank.plan import RankPlan

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(command: list[str], folder: Path) -> Path:
    environment = os.environ | dict(PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}", OMP_NUM_THREADS="1")
    done = subprocess.run([*command, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folders that one process, this one, and two left."""
    alone = tmp_path_factory.mktemp("alone")
    two_processes.main(alone)
    return alone, launched([*LAUNCH, str(TESTS / "two_processes.py")], tmp_path_factory.mktemp("together"))


def test_two_took_part(results):
    assert [read_json(folder / "fit.json")["processes"] for folder in results] == [1, 2]


def test_same_grams(results):
    alone, together = (read_weights(folder / "grams.safetensors") for folder in results)
    assert alone.keys() == together.keys()
    for name, gram in alone.items():
        assert (gram - together[name]).abs().max() <= 1e-12 * gram.abs().max()


@pytest.mark.parametrize("evaluation", ["exact", "fast", "screened"])
def test_same_plan(results, evaluation):
    alone, together = (RankPlan.load(folder / f"{evaluation}.json") for folder in results)
    assert together.layers == alone.layers
    assert [(p.layer, p.side, p.k, p.passed) for p in together.probes] == [
        (p.layer, p.side, p.k, p.passed) for p in alone.probes
    ]
    assert any(probe.passed for probe in alone.probes) and any(not probe.passed for probe in alone.probes)


def test_same_counts(results):
    alone, together = (read_json(folder / "fit.json") for folder in results)
    assert (together["correct"], together["accuracy"]) == (alone["correct"], alone["accuracy"])


def test_same_fit(results):
    alone, together = (read_json(folder / "fit.json") for folder in results)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["trained_on"] == pytest.approx(alone["trained_on"])
    weights = [read_weights(folder / "fit.safetensors") for folder in results]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_same_statistics_of_batch_norm(results):
    assert all(read_json(folder / "fit.json")["alike"] for folder in results)


def test_an_experiment_on_two_processes(tmp_path):
    """Every stage, written once, each process at the same stage as the other; and again, with nothing to do."""
    code = (
        "import sys; from conftest import UNTRAINED; from urank.reproduction.runner import run; "
        "print(run(UNTRAINED, sys.argv[1], 'cpu', progress=False).plan.mlu)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    folder = launched([*LAUNCH, str(script)], tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert (folder / "record.json") in stamps and not [path for path in stamps if path.name.startswith(".")]
    launched([*LAUNCH, str(script)], folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == stamps


def test_alone_a_process_has_everything():
    assert distributed.processes() == (0, 1) and distributed.is_first()
    assert list(distributed.share(range(5))) == list(range(5))
    assert distributed.totals(3, 4) == [3, 4]
    numbers = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.total(numbers), numbers)
