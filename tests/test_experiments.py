import ast
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, UNTRAINED, finished
from filelock import FileLock

from urank import datasets, models
from urank.calibration import accumulate_grams
from urank.deadline import OutOfTime
from urank.factorize import count_cost, load_compact, merge_useless, project_network
from urank.files import read_json, read_weights, write_json
from urank.layers import matrix_layers, weight_matrix
from urank.reproduction import figures, provenance, run_folder, runner, stages
from urank.reproduction.experiment import Experiment, check_start, fresh_network
from urank.reproduction.record import Record
from urank.reproduction.runner import claim, delete_run, run
from urank.reproduction.stages import STAGES
from urank.search.bisection import search_ranks
from urank.search.validation import evaluate
from urank.training.fitting import fit
from urank.training.recipe import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder():
    return finished()[0]


@pytest.fixture(scope="module")
def record():
    return finished()[1]


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def dataset():
    return datasets.load("digits10", train=400, test=100)


@pytest.fixture(scope="module")
def original(folder):
    network = models.create("vgg11", 10, 0.125)
    network.load_state_dict(read_weights(folder / "original.safetensors"))
    return network


def again(experiment, folder):
    return run(experiment, folder, "cpu", progress=False)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def measured(record):
    """The record without what differs from run to run: times, dates, and the code, which may be edited meanwhile."""
    content = record.to_dict()
    del content["seconds"]
    content["made"] = {stage: made["device"] for stage, made in content["made"].items()}
    for row in [row for history in content["history"].values() for row in history]:
        del row["seconds"]
    for row in content["latency"]:
        del row["images_per_second"]
    return content


def written(folder):
    """The files of all stages with the time at which they were written; a run rewrites what names it and its record."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths if path.name not in ("experiment.json", "record.json")}


class TestRecord:
    def test_has_the_keys_that_are_documented(self, record):
        keys = {"experiment", "accuracy", "cost", "plan", "spectra", "sweep", "history", "calibration_images"}
        keys |= {"consulted", "latency", "seconds", "made", "other_code", "versions", "weights"}
        assert record.to_dict().keys() == keys
        documented = (ROOT / "data" / "README.md").read_text()
        assert [key for key in record.to_dict() if f"`{key}`" not in documented] == []
        assert record.seconds.keys() == record.made.keys() == STAGES.keys()
        for made in record.made.values():
            assert made.keys() == {"device", "date", "code", "commit", "clean"} and made["code"] and made["commit"]
        assert record.other_code == []
        assert record.versions["torch"] == torch.__version__

    def test_is_on_disk_as_returned(self, folder, record):
        assert Record.load(folder / "record.json") == record
        assert record.experiment == TINY

    def test_names_the_versions_that_computed_it(self, copied, record, monkeypatch):
        """Not those that are there when it is read again."""
        finetune = read_json(copied / "finetune.json")
        finetune["made"]["versions"]["torch"] = "9.9"
        write_json(copied / "finetune.json", finetune)
        monkeypatch.setattr(provenance, "version", lambda package: "10.1")
        assert again(TINY, copied).versions == record.versions | dict(torch=f"{torch.__version__}, 9.9")

    def test_tells_which_weights_it_is_about(self, folder, record):
        assert record.weights == provenance.file_digest(folder / "original.safetensors")

    def test_survives_saving(self, record, tmp_path):
        record.save(tmp_path / "deep" / "record.json")
        assert Record.load(tmp_path / "deep" / "record.json") == record

    @pytest.mark.parametrize(
        "text", ["", '{"experiment": ', "[]", "{}", '{"experiment": {}, "plan": {}, "cost": {}}', "\x00\xff"]
    )
    def test_of_another_file(self, tmp_path, text):
        path = tmp_path / "record.json"
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=str(path)):
            Record.load(path)

    def test_of_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="record.json"):
            Record.load(tmp_path / "record.json")


class TestRun:
    def test_accuracies_are_those_of_the_saved_networks(self, folder, record, original, dataset):
        test, accuracy = dataset.batches(dataset.test), record.accuracy
        assert accuracy.original == evaluate(original, test)
        decomposed, finetuned = (load_compact(original, folder / name) for name in ("decomposed", "finetuned"))
        assert accuracy.decomposed == evaluate(decomposed, test)
        assert accuracy.finetuned == evaluate(finetuned, test)
        merged = evaluate(merge_useless(finetuned, original, record.plan), test)
        # The same function in another order of summation: an image between two classes may fall to the other side.
        assert accuracy.merged == pytest.approx(merged, abs=1) == pytest.approx(accuracy.finetuned, abs=1)
        assert accuracy.projected == pytest.approx(accuracy.decomposed, abs=2)
        assert len(set(astuple(accuracy))) > 1  # else little would have been shown

    def test_plan_is_that_of_a_search_by_hand(self, record, original, dataset):
        calibration, validation = dataset.batches(dataset.train.take(150)), dataset.batches(dataset.test.take(80))
        grams = accumulate_grams(original, calibration, progress=False)
        plan = search_ranks(original, grams, validation, tolerance=1.25, mode="joint", progress=False)
        assert record.plan == plan
        assert record.calibration_images == 150 and plan.total == 80

    def test_projected_accuracy_is_that_of_the_plan(self, folder, record, original, dataset):
        projected = project_network(original, record.plan, run_folder.calibrated_grams(folder))
        assert record.accuracy.projected == evaluate(projected, dataset.batches(dataset.test))
        validation = dataset.batches(dataset.test.take(80))
        assert round(0.8 * evaluate(projected, validation)) == record.plan.layers[-1].correct

    def test_cost_is_counted_by_formula(self, record, original):
        """Two factors of rank r hold r (d + m) of d m weights and cost that many MACs at each output position."""
        positions = [1024, 256, 64, 64, 16, 16, 4, 4, 1]
        params, macs = sum(parameter.numel() for parameter in original.parameters()), 0
        costs = dict(original=[params, macs], compact=[params, macs], split=[params, macs])
        for entry, places in zip(record.plan.layers, positions):
            whole, thin = entry.d * entry.m, max(1, entry.rank) * (entry.d + entry.m)
            for name, weights in dict(original=whole, compact=min(whole, thin), split=thin).items():
                costs[name][0] += weights - whole
                costs[name][1] += weights * places
        assert {name: list(cost.values()) for name, cost in asdict(record.cost).items()} == costs
        assert record.cost.original == count_cost(original)
        assert record.params_ratio == costs["compact"][0] / costs["original"][0] < 1
        assert record.macs_ratio == costs["compact"][1] / costs["original"][1]

    def test_spectra_are_those_of_the_weights(self, folder, record, original):
        grams, layers = run_folder.calibrated_grams(folder), matrix_layers(original)
        assert list(record.spectra) == list(grams) == [entry.layer for entry in record.plan.layers]
        for entry in record.plan.layers:
            spectrum, W = record.spectra[entry.layer], weight_matrix(layers[entry.layer]).numpy()
            gram = grams[entry.layer].double().numpy()
            size = min(entry.d, entry.m)
            np.testing.assert_allclose(spectrum.weight, np.linalg.svd(W, compute_uv=False), rtol=1e-5)
            inputs, outputs = np.linalg.eigvalsh(gram)[::-1], np.linalg.eigvalsh(W.T @ gram @ W)[::-1]
            np.testing.assert_allclose(np.square(spectrum.inputs), inputs, rtol=2e-5, atol=1e-6 * inputs[0])
            np.testing.assert_allclose(np.square(spectrum.outputs), outputs, rtol=2e-5, atol=1e-6 * outputs[0])
            projected = np.array(spectrum.projected)
            assert len(projected) == size and (np.diff(projected) <= 0).all()
            assert (projected[min(entry.k_s, entry.k_t) :] < 1e-6 * projected[0]).all()
            energy = figures.cumulative(projected)
            assert energy[entry.rank] >= 0.9999 * (1 - 1e-5)
            assert entry.rank == 1 or energy[entry.rank - 1] < 0.9999 * (1 + 1e-5)

    def test_sweep_rises_to_the_whole_layer(self, record, folder, original, dataset):
        layers = matrix_layers(original)
        grams = run_folder.calibrated_grams(folder)
        assert [row.layer for row in record.sweep] == ["features.8"] * 14 + ["classifier"] * 14
        for row in record.sweep:
            eigenvalues = np.linalg.eigvalsh(grams[row.layer].double().numpy())[::-1]
            energy = eigenvalues.cumsum() / eigenvalues.sum()
            assert energy[row.k_s - 1] >= row.energy - 1e-9
            assert row.k_s == 1 or energy[row.k_s - 2] < row.energy + 1e-9
            assert 0 <= row.norm_difference < 1
        row = record.sweep[9]  # one of them by hand
        W = weight_matrix(layers["features.8"]).numpy()
        V = np.linalg.eigh(grams["features.8"].double().numpy())[1][:, -row.k_s :]
        projected = V @ V.T @ W
        assert row.norm_difference == pytest.approx(np.linalg.norm(W - projected) / np.linalg.norm(W), rel=1e-6)
        network = models.create("vgg11", 10, 0.125)
        network.load_state_dict(original.state_dict())
        stages.set_weight_matrix(network.features[8], torch.from_numpy(projected))
        correct = 0.8 * evaluate(network, dataset.batches(dataset.test.take(80)))
        assert abs(correct - row.correct) < 1.5

    def test_sweep_gives_the_weight_back(self, folder, original):
        """Else the layers after it would be swept in another network."""
        layer = matrix_layers(original)["features.8"]
        before = layer.weight.detach().clone()
        rows = stages.sweep_layer(layer, run_folder.calibrated_grams(folder)["features.8"], [])
        assert rows[0]["norm_difference"] > 0.01
        assert torch.equal(layer.weight, before)

    def test_histories_are_those_of_the_recipes(self, record):
        history = record.history
        assert [row["epoch"] for row in history["train"]] == [0, 1, 2, 3]
        assert [row["epoch"] for row in history["finetune"]] == [row["epoch"] for row in history["baseline"]] == [0, 1]
        assert history["train"][-1]["loss"] < history["train"][0]["loss"]

    def test_again_computes_nothing(self, folder, record):
        before = written(folder)
        assert again(TINY, folder) == record
        assert written(folder) == before
        assert len(before) == len(STAGES) + 7  # three networks, the Gram matrices, two plans, which labels

    def test_leaves_no_checkpoint_and_no_temporary_file(self, folder):
        assert [path.name for path in folder.rglob("*") if path.suffix == ".ckpt" or path.name.startswith(".")] == []


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from urank.reproduction.runner import run
from urank.reproduction.experiment import Experiment

torch.set_num_threads(int(sys.argv[3]))
experiment, folder = Experiment.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
for landmark in ("train.ckpt", "train.json", "finetune.ckpt"):
    child = os.fork()
    if not child:
        run(experiment, folder, "cpu", progress=False)
        os._exit(0)
    ended = 0
    while not (folder / landmark).exists() and not ended:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps(dict(signal=os.WTERMSIG(status), left=left)), flush=True)
"""


class TestKilledRun:
    def test_ends_as_an_uninterrupted_one(self, record, tmp_path):
        """Killed in training, after it and in fine-tuning, then run to its end."""
        folder, threads = tmp_path / "killed", str(torch.get_num_threads())
        command = [sys.executable, "-c", KILLED, json.dumps(asdict(TINY)), str(folder), threads]
        environment = dict(os.environ, OMP_NUM_THREADS=threads, TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kills = [json.loads(line) for line in done.stdout.splitlines()]
        assert [kill["signal"] for kill in kills] == [signal.SIGKILL] * 3
        assert "train.json" not in kills[0]["left"]  # the training was half done
        assert "finetune.json" not in kills[2]["left"]
        assert all("record.json" not in kill["left"] for kill in kills)
        before = written(folder)
        resumed = again(TINY, folder)
        assert measured(resumed) == measured(record)
        after = written(folder)
        assert all(after[folder / f"{stage}.json"] == before[folder / f"{stage}.json"] for stage in ("train", "search"))

    @pytest.mark.parametrize("stage", ["train", "finetune"])
    def test_keeps_a_training_until_its_stage_is_written(self, copied, monkeypatch, stage):
        """Killed between the last epoch and the stage's file: the epochs are not lost."""
        (copied / f"{stage}.json").unlink()
        monkeypatch.setattr(stages, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(TINY, copied)
        assert (copied / f"{stage}.ckpt").exists()


class TestDamage:
    def test_folder_of_another_experiment(self, copied):
        before = written(copied), (copied / "experiment.json").read_bytes()
        with pytest.raises(ValueError, match=f"{copied} contains another experiment"):
            again(replace(TINY, seed=1), copied)
        assert (written(copied), (copied / "experiment.json").read_bytes()) == before

    def test_folder_in_which_another_experiment_computed_nothing(self, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="do not fill a batch"):
            run(replace(UNTRAINED, train=Recipe(epochs=1, batch_size=100)), tmp_path, "cpu", progress=False)
        assert run(UNTRAINED, tmp_path, "cpu", progress=False).experiment == UNTRAINED

    def test_experiment_json_that_holds_a_list(self, copied):
        write_json(copied / "experiment.json", [1])
        with pytest.raises(ValueError, match="another experiment"):
            again(TINY, copied)

    @pytest.mark.parametrize("name", ["experiment.json", "train.json", "search.json", "finetune.json"])
    def test_cut_off_json_is_named(self, copied, name):
        text = (copied / name).read_text()
        (copied / name).write_text(text[: len(text) // 2])
        with pytest.raises(ValueError, match=f"{copied / name}: not a valid JSON file"):
            again(TINY, copied)
        assert (copied / name).read_text() == text[: len(text) // 2]

    def test_of_an_experiment_json_that_something_else_wrote(self, copied):
        write_json(copied / "experiment.json", dict(network="vgg11"))
        with pytest.raises(ValueError, match="experiment.json|another experiment"):
            again(TINY, copied)

    def test_the_advice_to_delete_a_cut_off_stage_works(self, copied, record):
        (copied / "search.json").write_text("{")
        (copied / "search.json").unlink()
        assert measured(again(TINY, copied)) == measured(record)

    def test_what_a_lost_stage_led_to_is_computed_anew(self, copied, monkeypatch):
        """Else the record would be about two networks; killed after the first stage it still is about one."""
        (copied / "original.safetensors").unlink()
        monkeypatch.setattr(stages, "accumulate_grams", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(TINY, copied)
        assert {path.name for path in copied.glob("*.json")} == {"experiment.json", "labels.json", "train.json"}

    def test_a_stage_killed_while_it_is_computed_anew_is_not_taken_for_finished(self, copied, monkeypatch):
        """Its weights are written before its JSON file: the old one must be gone by then."""
        (copied / "original.safetensors").unlink()
        monkeypatch.setattr(stages, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(TINY, copied)
        assert (copied / "original.safetensors").exists() and not (copied / "train.json").exists()

    def test_a_lost_stage_costs_nothing_that_did_not_read_it(self, copied, record):
        kept = {name: (copied / f"{name}.json").stat().st_mtime_ns for name in ("finetune", "baseline", "latency")}
        (copied / "sweep.json").unlink()
        assert measured(again(TINY, copied)) == measured(record)
        assert {name: (copied / f"{name}.json").stat().st_mtime_ns for name in kept} == kept

    def test_every_stage_but_the_first_reads_an_earlier_one(self):
        names = list(STAGES)
        assert list(run_folder.READS) == names[1:]
        assert all(names.index(read) < names.index(name) for name, read in run_folder.READS.items())

    def test_a_fit_gone_on_with_by_other_code_is_made_by_both(self, copied, record, monkeypatch):
        (copied / "train.json").unlink()
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(stages, "evaluate", interrupted)
            again(TINY, copied)
        monkeypatch.setattr(run_folder, "code_digest", lambda: "of now")
        monkeypatch.setattr(stages, "accumulate_grams", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(TINY, copied)
        made = read_json(copied / "train.json")["made"]
        assert (
            made["code"] == f"{provenance.code_digest()}, of now" and made["device"] == record.made["train"]["device"]
        )
        assert made["versions"] == record.versions and not (copied / "train.begun").exists()

    def test_another_run_in_the_same_folder_is_waited_for(self, copied, record, capsys):
        """Both would write the same files."""
        lock, said = FileLock(copied.with_name(f".{copied.name}.lock")), ""
        lock.acquire()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(again, TINY, copied)
            for _ in range(1000):
                said += capsys.readouterr().err
                if "waiting for another run" in said:
                    break
                time.sleep(0.01)
            done_while_waiting = waiting.done()
            lock.release()
            assert measured(waiting.result()) == measured(record)
        assert "waiting for another run" in said and not done_while_waiting

    def test_other_images_than_it_was_trained_on(self, copied, monkeypatch):
        """As when URANK_DATA names another folder by now."""
        (copied / "calibrate.json").unlink()
        fewer = datasets.load("digits10", train=400, test=90)
        monkeypatch.setattr(run_folder, "load_images", lambda _: fewer)
        with pytest.raises(ValueError, match="labels.json: this run began with other digits10 images"):
            again(TINY, copied)

    def test_folder_without_its_experiment_json(self, copied, record):
        """As a restart leaves it that is killed while it deletes the folder."""
        (copied / "experiment.json").unlink()
        with pytest.raises(ValueError, match="no experiment.json that names them; use --fresh"):
            again(TINY, copied)
        delete_run(copied)
        assert not copied.exists() and measured(again(TINY, copied)) == measured(record)

    @pytest.mark.parametrize(
        "name, reader",
        [("original.safetensors", "calibrate"), ("grams.safetensors", "spectra"), ("decomposed/plan.json", "finetune")],
    )
    def test_the_advice_to_delete_what_else_is_cut_off_works(self, copied, record, name, reader):
        path = copied / name
        path.write_bytes(path.read_bytes()[:1000])
        (copied / f"{reader}.json").unlink()
        with pytest.raises(ValueError, match=f"{path}: .*; delete "):
            again(TINY, copied)
        path.unlink()
        assert measured(again(TINY, copied)) == measured(record)


class TestRefusal:
    @pytest.mark.parametrize(
        "wrong, named",
        [
            (dict(network="vgg12"), "vgg12"),
            (dict(dataset="mnist"), "mnist"),
            (dict(data=dict(trian=20, test=10)), "trian"),
            (dict(mode="jointly"), "jointly"),
            (dict(tolerance=-1.0), "-1"),
            (dict(sweep=("features.99",)), "features.99"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_comes_before_the_training(self, tmp_path, wrong, named):
        """A wrong name costs no training, and the corrected experiment may have the folder."""
        with pytest.raises(ValueError, match=named):
            again(replace(UNTRAINED, **wrong), tmp_path / "run")
        assert not list(tmp_path.rglob("*.json"))

    def test_of_a_device(self, tmp_path):
        with pytest.raises(ValueError, match="quantum"):
            run(UNTRAINED, tmp_path / "run", "quantum", progress=False)


class TestFromDict:
    def test_is_the_inverse_of_asdict(self):
        assert Experiment.from_dict(asdict(TINY)) == TINY
        assert Experiment.from_dict(json.loads(json.dumps(asdict(TINY)))) == TINY

    @pytest.mark.parametrize(
        "change, named",
        [
            (dict(netwrok="vgg11"), "netwrok"),
            (dict(train=dict(epochs=1, rate=0.1)), "rate"),
            (dict(train=dict(lr=0.1)), "epochs"),
            (dict(train=None), "train must be a mapping of recipe fields, got None"),
            (dict(train=dict(epochs=-1)), "epochs"),
            (dict(train=dict(epochs=1, lr="1e-1")), "lr"),  # what YAML reads 1e-1 as
            (dict(sweep="features.8"), "sweep"),  # a name is a sequence of letters
            (dict(variant="a/b"), "variant"),
            (dict(variant=0.5), "variant"),  # what YAML reads 0.5 as
            (dict(variant="probe-s1"), "variant"),  # would be the name of seed 1 of "probe"
            (dict(start=3), "start"),
            (dict(trainable="tail"), "trainable"),
            (dict(holdout=-1), "holdout"),
            (dict(holdout=0.1), "holdout"),
            (dict(width="1e-1"), "width must be a number"),
            (dict(width=0), "width must be positive"),
            (dict(tolerance="1e-1"), "tolerance must be a number"),
            (dict(seed=-1), "seed must be a whole number of at least 0"),
            (dict(seed=1.5), "seed must be a whole number"),
            (dict(seed=None), "seed must be a whole number"),
            (dict(calibration=-5), "calibration must be a whole number of at least 1"),
            (dict(calibration="1000"), "calibration must be a whole number"),
            (dict(validation=0), "validation must be a whole number of at least 1"),
            (dict(data=None), "data must be a mapping"),
            (dict(options=3), "options must be a mapping"),
            (dict(variant="x-s12"), "not end like a seed"),
            (dict(baseline="no"), "baseline"),
        ],
        ids=str,
    )
    def test_refuses(self, change, named):
        with pytest.raises(ValueError, match=named):
            Experiment.from_dict(asdict(TINY) | change)

    @pytest.mark.parametrize("missing", ["network", "dataset", "train", "finetune"])
    def test_refuses_what_is_incomplete(self, missing):
        content = asdict(TINY)
        del content[missing]
        with pytest.raises(ValueError, match=missing):
            Experiment.from_dict(content)

    @pytest.mark.parametrize("content", [None, "vgg11", ["vgg11"], 3])
    def test_refuses_what_is_no_mapping(self, content):
        with pytest.raises(ValueError, match="experiment"):
            Experiment.from_dict(content)

    def test_takes_the_layers_to_sweep_as_a_list(self):
        assert replace(TINY, sweep=list(TINY.sweep)) == TINY

    def test_draws_no_numbers(self):
        """Neither an experiment nor a record that is read reseeds the generator of whoever does it."""
        before = torch.get_rng_state()
        assert replace(TINY, seed=5).seed == 5
        assert torch.equal(torch.get_rng_state(), before)

    def test_name_tells_seeds_apart(self):
        assert TINY.name == "digits10/vgg11"
        assert replace(TINY, seed=3).name == "digits10/vgg11-s3"

    def test_name_tells_variants_apart(self):
        assert replace(TINY, variant="linear-probe").name == "digits10/vgg11@linear-probe"
        assert replace(TINY, variant="eps_0.5", seed=3).name == "digits10/vgg11@eps_0.5-s3"


PROBE = replace(UNTRAINED, variant="probe", start="digits10/vgg11")


def weights_of(folder):
    return read_weights(folder / "original.safetensors")


class TestStart:
    def started(self, folder, tmp_path, **changes):
        experiment = replace(PROBE, **changes)
        record = run(experiment, tmp_path / "run", "cpu", progress=False, start=folder)
        assert record.experiment == experiment
        return record, weights_of(tmp_path / "run")

    def test_takes_the_trained_network_as_it_is(self, folder, record, tmp_path):
        started, weights = self.started(
            folder, tmp_path, data=TINY.data, validation=80, tolerance=1.25, calibration=150
        )
        trained = weights_of(folder)
        assert weights.keys() == trained.keys()
        assert all(weights[name].equal(trained[name]) for name in weights)
        assert started.plan == record.plan and started.history["train"] == []
        assert started.accuracy.original == record.accuracy.original

    def test_takes_all_but_a_classifier_for_other_classes(self, folder, tmp_path):
        experiment = replace(PROBE, dataset="digits100", data=dict(train=100, test=100))
        _, weights = self.started(folder, tmp_path, dataset="digits100", data=experiment.data)
        trained, fresh = weights_of(folder), fresh_network(experiment).state_dict()
        for name, tensor in weights.items():
            assert tensor.equal((fresh if name.startswith("classifier.") else trained)[name]), name

    def test_fits_the_head_alone(self, folder, tmp_path):
        recipe = Recipe(epochs=2, batch_size=10, crop=2, flip=False)
        _, weights = self.started(folder, tmp_path, trainable="head", train=recipe)
        trained = weights_of(folder)
        changed = {name for name, tensor in weights.items() if not tensor.equal(trained[name])}
        assert changed == {"classifier.weight", "classifier.bias"}

    @pytest.mark.parametrize(
        "changes, named",
        [
            (dict(width=0.25), r"width 0.25\) cannot start from digits10/vgg11"),
            (dict(network="vgg13"), r"\(vgg13, width 0.125\) cannot start"),
            (dict(start="digits10/vgg13"), "starts from digits10/vgg13, not from digits10/vgg11"),
            (dict(holdout=5), "holds out 5 images"),
            (dict(start=None), "start must be None, because its weights are seeded"),
        ],
        ids=str,
    )
    def test_refuses_another_network(self, folder, tmp_path, changes, named):
        with pytest.raises(ValueError, match=named):
            self.started(folder, tmp_path, **changes)
        assert not (tmp_path / "run").exists()

    def test_refuses_to_start_from_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="start must be the folder of digits10/vgg11, got None"):
            again(PROBE, tmp_path / "run")
        with pytest.raises(ValueError, match="was not trained"):
            run(PROBE, tmp_path / "run", "cpu", start=tmp_path / "nothing")

    def test_notices_that_its_start_was_trained_anew(self, folder, copied, tmp_path):
        run(PROBE, tmp_path / "run", "cpu", progress=False, start=folder)
        weights = weights_of(copied)
        stages.write_tensors(copied / "original.safetensors", weights | {"classifier.bias": torch.ones(10)})
        before = written(tmp_path / "run")
        with pytest.raises(ValueError, match="started from other weights of digits10/vgg11; use --fresh"):
            run(PROBE, tmp_path / "run", "cpu", progress=False, start=copied)
        assert written(tmp_path / "run") == before
        run(PROBE, tmp_path / "run", "cpu", progress=False, start=copied, recompute=True)
        assert weights_of(tmp_path / "run")["classifier.bias"].equal(torch.ones(10))

    def test_adopts_no_layer_of_another_shape(self, original):
        weights = dict(original.state_dict())
        weights["features.0.weight"] = torch.zeros(9, 3, 3, 3)
        with pytest.raises(ValueError, match="apart from its classifier classifier: features.0.weight"):
            run_folder.adopt(fresh_network(TINY), weights, (3, 32, 32))
        del weights["features.0.weight"]
        with pytest.raises(ValueError, match="features.0.weight"):
            run_folder.adopt(fresh_network(TINY), weights, (3, 32, 32))


class TestOrder:
    def test_backward_searches_the_last_layer_first(self, folder, record, tmp_path):
        experiment = replace(TINY, variant="backward", order="backward", start="digits10/vgg11", train=UNTRAINED.train)
        experiment = replace(experiment, finetune=UNTRAINED.finetune, sweep=())
        found = run(experiment, tmp_path, "cpu", progress=False, start=folder).plan
        network = run_folder.original_network(TINY, folder)
        grams = dict(reversed(run_folder.calibrated_grams(folder).items()))
        dataset = datasets.load("digits10", **TINY.data)
        expected = search_ranks(network, grams, dataset.batches(dataset.test.take(80)), TINY.tolerance, progress=False)
        assert found.layers == expected.layers[::-1] and found.probes == expected.probes
        assert [entry.layer for entry in found.layers] == [entry.layer for entry in record.plan.layers]
        assert found.layers != record.plan.layers

    def test_another_one_is_refused(self):
        with pytest.raises(ValueError, match="order must be 'forward' or 'backward', got 'sideways'"):
            replace(TINY, order="sideways")


class TestHoldout:
    HELD = replace(UNTRAINED, holdout=7, data=dict(train=20, test=10), validation=6, calibration=None)

    def test_is_what_the_search_consults_and_nothing_is_trained_on(self, tmp_path):
        record = again(self.HELD, tmp_path)
        assert record.consulted == "held-out training" and record.plan.total == 6
        assert record.calibration_images == 13
        digits, network = datasets.load("digits10", train=20, test=10), fresh_network(self.HELD)
        held_out = digits.batches(datasets.Split(digits.train.images[13:19], digits.train.labels[13:19]))
        grams = run_folder.calibrated_grams(tmp_path)
        assert record.plan == search_ranks(network, grams, held_out, tolerance=100.0, progress=False)

    def test_splits_the_training_images(self, dataset):
        kept, held_out = run_folder.hold_out(dataset, 30)
        assert (len(kept.train), len(held_out)) == (370, 30)
        assert torch.cat([kept.train.images, held_out.images]).equal(dataset.train.images)
        assert torch.cat([kept.train.labels, held_out.labels]).equal(dataset.train.labels)
        assert kept.test is dataset.test

    def test_of_none_consults_test_images(self, record):
        assert record.consulted == "test"

    def test_of_all_images_is_refused(self, dataset):
        with pytest.raises(ValueError, match="cannot hold out 400 of 400 training images"):
            run_folder.hold_out(dataset, 400)


class TestBaseline:
    def test_is_the_original_fitted_by_the_same_recipe(self, record, original, dataset):
        network = copy.deepcopy(original)
        history = fit(network, dataset, TINY.finetune, TINY.seed)
        assert record.accuracy.baseline == evaluate(network, dataset.batches(dataset.test))
        assert [row["loss"] for row in record.history["baseline"]] == [row["loss"] for row in history]

    @pytest.mark.parametrize("changes", [{}, dict(baseline=False, finetune=Recipe(epochs=1, batch_size=10, crop=2))])
    def test_is_left_out(self, tmp_path, changes):
        record = again(replace(UNTRAINED, **changes), tmp_path)
        assert record.accuracy.baseline is None and record.history["baseline"] == []
        assert "baseline" not in record.made and not (tmp_path / "baseline.json").exists()


class TestTied:
    def test_a_matrix_is_trained_once_and_measured_at_each_use(self, tmp_path):
        experiment = replace(UNTRAINED, network="vit_pe", width=0.17, train=Recipe(epochs=1, batch_size=20, crop=2))
        record = again(experiment, tmp_path)
        weights = read_weights(tmp_path / "original.safetensors")
        assert torch.equal(weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"])
        uses = [layer.layer for layer in record.plan.layers if layer.layer.startswith("blocks.0.")]
        names = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert uses == [f"blocks.0.{name}" for name in names]
        assert record.cost.original == count_cost(fresh_network(experiment))
        assert record.cost.original.params < sum(layer.d * layer.m for layer in record.plan.layers)


class TestLatency:
    def test_has_both_networks_at_both_batch_sizes(self, record):
        rows = [row for row in record.throughput if row.precision == "float32"]
        assert [(row.network, row.batch) for row in rows] == [
            ("original", 1), ("compact", 1), ("original", 256), ("compact", 256)
        ]  # fmt: skip
        assert all(row.images_per_second > 0 and row.device for row in record.throughput)

    def test_times_the_network_whose_cost_is_reported(self, folder, record):
        shared = run_folder.RunFolder(TINY, folder, torch.device("cpu"), False, None, None)
        assert count_cost(shared.merged()) == record.cost.compact


class TestDeadline:
    def test_that_has_passed_lets_no_stage_begin(self, tmp_path):
        with pytest.raises(OutOfTime, match="digits10/vgg11: stage train was not started"):
            run(UNTRAINED, tmp_path, "cpu", progress=False, deadline=time.monotonic())
        assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]

    def test_that_has_passed_lets_what_is_there_be_read(self, copied, record):
        assert run(TINY, copied, "cpu", progress=False, deadline=time.monotonic()) == record

    def test_is_kept_while_another_run_works_there(self, copied, record):
        lock = FileLock(copied.with_name(f".{copied.name}.lock"))
        with lock, pytest.raises(OutOfTime, match="another run still works"):
            run(TINY, copied, "cpu", progress=False, deadline=time.monotonic() + 0.2)
        assert again(TINY, copied) == record

    def test_keeps_the_epochs_of_a_fit(self, copied, record, monkeypatch):
        """The time is over during the first epoch of the fine-tuning; the next call goes on with the second."""
        (copied / "finetune.json").unlink()
        monkeypatch.setattr(run_folder, "check_time", lambda *_: None)  # the stage has begun in time
        with pytest.raises(OutOfTime, match="digits10/vgg11 finetune has 1 of 2 epochs left"):
            run(TINY, copied, "cpu", progress=False, deadline=time.monotonic())
        assert (copied / "finetune.ckpt").exists() and not (copied / "finetune.json").exists()
        assert measured(again(TINY, copied)) == measured(record)

    def test_lets_one_layer_of_a_search_be_found(self, copied, record, monkeypatch):
        (copied / "search.json").unlink()
        with monkeypatch.context() as begun, pytest.raises(OutOfTime, match="the rank search has 8 of 9 layers left"):
            begun.setattr(run_folder, "check_time", lambda *_: None)
            run(TINY, copied, "cpu", progress=False, deadline=time.monotonic())
        before = read_json(copied / "search.begun") | dict(seconds=1000.0)
        (copied / "search.begun").write_text(json.dumps(before))
        resumed = again(TINY, copied)
        assert measured(resumed) == measured(record)
        assert 1000 < resumed.seconds["search"] < 1100 and not list(copied.glob("search.[bc]*"))


class TestEarlierVersions:
    """What was written before experiments had variants, starts, ... and recipes could be compiled."""

    NEW = ("variant", "start", "trainable", "holdout", "baseline")

    def test_record_is_read_with_defaults(self, record):
        content = record.to_dict()
        for key in self.NEW:
            del content["experiment"][key]
        experiment = Record.from_dict(content).experiment
        assert experiment.name == "digits10/vgg11"
        assert (experiment.start, experiment.trainable, experiment.holdout) == (None, "all", 0)

    def test_folder_is_gone_on_with(self, copied, record):
        begun = read_json(copied / "experiment.json")
        del begun["start"]
        for key in self.NEW:
            del begun["definition"][key]
        for recipe in ("train", "finetune"):
            del begun["definition"][recipe]["compile"]
        write_json(copied / "experiment.json", begun)
        before = written(copied)
        assert again(TINY, copied) == record
        assert written(copied) == before

    def test_folder_of_another_experiment_is_still_refused(self, copied):
        begun = read_json(copied / "experiment.json")
        for key in self.NEW:
            del begun["definition"][key]
        write_json(copied / "experiment.json", begun)
        with pytest.raises(ValueError, match="another experiment"):
            again(replace(TINY, holdout=10), copied)


class TestSettings:
    """What no stage has read yet may be changed; the network that was trained is kept."""

    FASTER = replace(TINY, finetune=replace(TINY.finetune, epochs=1), baseline=False)

    @pytest.mark.parametrize(
        "changes, what, files",
        [
            (dict(tolerance=2.0), "tolerance", "search.json"),
            (
                dict(validation=50, calibration=100),
                "calibration and validation",
                "calibrate.json and search.json and sweep.json",
            ),
            (dict(finetune=Recipe(epochs=1)), "finetune", "finetune.json and baseline.json"),
        ],
    )
    def test_that_a_stage_has_read_are_refused(self, copied, changes, what, files):
        before = written(copied), (copied / "experiment.json").read_bytes()
        with pytest.raises(ValueError, match=f"was run with another {what} .*: delete {files}"):
            again(replace(TINY, **changes), copied)
        assert (written(copied), (copied / "experiment.json").read_bytes()) == before

    def test_the_advice_works(self, copied):
        trained = written(copied)[copied / "train.json"]
        (copied / "search.json").unlink()
        searched = again(replace(TINY, tolerance=20.0), copied)
        assert searched.experiment.tolerance == 20.0 and searched.plan.tolerance == 20.0
        assert written(copied)[copied / "train.json"] == trained
        assert again(replace(TINY, tolerance=20.0), copied) == searched

    def test_of_a_stage_to_come_are_changed(self, copied, tmp_path):
        trained = written(copied)[copied / "train.json"]
        for stage in ("finetune", "baseline", "latency"):
            (copied / f"{stage}.json").unlink()
        shorter = again(self.FASTER, copied)
        assert shorter.experiment == self.FASTER and written(copied)[copied / "train.json"] == trained
        assert measured(shorter) == measured(again(self.FASTER, tmp_path / "fresh"))

    def test_that_a_stage_reads_are_named(self, tmp_path, monkeypatch):
        """A setting read by a stage that is not named with it could be changed after that stage."""
        running, read = [""], {name: set() for name in ("", *STAGES)}

        class Watched(Experiment):
            def __getattribute__(self, name):
                read[running[0]].add(name)
                return super().__getattribute__(name)

        def watched(name, compute):
            def result(work):
                running[0] = name
                vars(work).pop("validation", None)  # kept from an earlier stage, it would not be read again
                content = compute(work)
                running[0] = ""
                return content

            return result

        for name, compute in STAGES.items():
            monkeypatch.setitem(STAGES, name, watched(name, compute))
        settings = {setting.name: getattr(UNTRAINED, setting.name) for setting in fields(Experiment)}
        again(Watched(**settings | dict(finetune=Recipe(epochs=1, batch_size=10), sweep=["classifier"])), tmp_path)
        named = {name for names in run_folder.SETTINGS.values() for name in names}
        for name in set(STAGES) - {"train"}:
            assert read[name] & named == set(run_folder.SETTINGS.get(name, [])), name

    def test_of_speed_alone_are_changed_at_any_time(self, copied, record):
        faster = {fit: replace(getattr(TINY, fit), capture=True) for fit in ("train", "finetune")}
        before = written(copied)
        changed = again(replace(TINY, **faster), copied)
        assert changed.experiment.train.capture and changed.accuracy == record.accuracy
        assert written(copied) == before

    def test_an_epoch_of_it_counts_as_begun(self, copied):
        (copied / "finetune.json").unlink()
        (copied / "baseline.json").rename(copied / "finetune.ckpt")
        with pytest.raises(ValueError, match="delete finetune.ckpt there"):
            again(self.FASTER, copied)

    def test_a_baseline_may_come_and_go(self, copied, record):
        without = again(replace(TINY, baseline=False), copied)
        assert without.accuracy.baseline is None and "baseline" not in without.seconds
        assert measured(again(TINY, copied)) == measured(record)

    def test_the_record_of_the_former_ones_is_gone(self, copied):
        """Else it would be published as that of the new ones."""
        (copied / "finetune.json").unlink(), (copied / "baseline.json").unlink()
        claim(copied, self.FASTER, recompute=False)
        assert not (copied / "record.json").exists()


class TestCode:
    def begun(self, folder, code):
        """A folder in which `code` finished the training."""
        claim(folder, TINY, recompute=False)
        write_json(folder / "experiment.json", read_json(folder / "experiment.json") | dict(code=code))
        write_json(folder / "train.json", dict(made=dict(code=code, commit=None), seconds=5.0))
        return folder

    @pytest.mark.parametrize("recompute", [False, True])
    def test_results_of_the_same_code_are_kept_without_a_word(self, tmp_path, capsys, recompute):
        folder = self.begun(tmp_path / "run", provenance.code_digest())
        claim(folder, TINY, recompute)
        assert (folder / "train.json").exists() and capsys.readouterr().err == ""

    def test_results_of_other_code_are_kept_and_named(self, tmp_path, capsys):
        folder = self.begun(tmp_path / "run", "abc")
        claim(folder, TINY, recompute=False)
        assert (folder / "train.json").exists()
        said = (
            "digits10/vgg11: keeping train, computed by another version of the code (code abc); --fresh recomputes them"
        )
        assert capsys.readouterr().err == f"{said}\n"

    def test_the_record_names_results_of_other_code(self, copied, monkeypatch):
        (copied / "sweep.json").unlink()
        for module in (runner, run_folder):
            monkeypatch.setattr(module, "code_digest", lambda: "of now")
        record = again(TINY, copied)
        assert record.other_code == [name for name in STAGES if name != "sweep"]
        assert record.made["sweep"]["code"] == "of now" != record.made["train"]["code"]

    @pytest.mark.parametrize("stage", ["train", "calibrate"])
    def test_results_of_other_code_are_recomputed_where_that_is_asked_for(self, tmp_path, stage):
        folder = self.begun(tmp_path / "run", provenance.code_digest())
        write_json(folder / f"{stage}.json", dict(made=dict(code="abc")))
        claim(folder, TINY, recompute=True)
        assert not (folder / "train.json").exists() and (folder / "experiment.json").exists()

    def test_another_experiment_is_never_deleted(self, tmp_path):
        folder = self.begun(tmp_path / "run", "abc")
        with pytest.raises(ValueError, match="another experiment"):
            claim(folder, replace(TINY, seed=1), recompute=True)
        assert (folder / "train.json").exists()

    def test_comments_and_docstrings_do_not_change_it(self):
        source = 'def f(x):\n    """Add one."""\n    return x + 1\n'
        edited = '# A comment.\ndef f(x):\n    """Return x + 1."""\n\n    return x + 1  # here\n'
        assert provenance.statements(source) == provenance.statements(edited) != provenance.statements("f = 1")
        assert provenance.statements('class A:\n    """Empty."""\n') == provenance.statements("class A:\n    pass\n")

    def test_is_that_which_was_imported_not_that_on_disk_by_now(self):
        program = (
            "from urank.reproduction import provenance; provenance.code_files = list; print(provenance.code_digest())"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == provenance.code_digest()

    def test_git_state_is_that_of_the_checkout(self, monkeypatch, tmp_path):
        state = provenance.git_state.__wrapped__()
        assert re.fullmatch("[0-9a-f]{12}", state["commit"]) and isinstance(state["clean"], bool)
        monkeypatch.setattr(provenance, "ROOT", tmp_path)
        assert provenance.git_state.__wrapped__() == dict(commit=None, clean=None)

    def test_counts_every_module_that_measures(self):
        """What an experiment imports is either counted, or has no part in what is measured."""
        counted = set(provenance.code_files())
        for path in counted:
            imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            for node in imports:
                module = ROOT / (node.module or "").replace(".", "/")
                if node.module and node.module.startswith("urank.reproduction."):
                    assert module.with_suffix(".py") in counted, (path, node.module)


class TestOptions:
    SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)

    def test_reach_the_constructor_of_the_network(self):
        experiment = replace(UNTRAINED, network="timm/vit_tiny_patch16_224", width=1.0, options=self.SMALL)
        network = fresh_network(experiment)
        assert (network.embed_dim, len(network.blocks), network.patch_embed.num_patches) == (16, 1, 16)

    def test_must_be_those_of_the_network_that_it_starts_from(self):
        first = replace(UNTRAINED, network="timm/vit_tiny_patch16_224", width=1.0, options=self.SMALL)
        second = replace(first, variant="deeper", start=first.name, options=self.SMALL | dict(depth=2))
        with pytest.raises(ValueError, match="cannot start from digits10/timm/vit_tiny_patch16_224"):
            check_start(second, first)
