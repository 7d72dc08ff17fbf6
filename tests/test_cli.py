import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import finished

from urank import cli
from urank.files import read_json, write_json
from urank.reproduction import profiles, runner
from urank.reproduction.record import Record
from urank.reproduction.stages import STAGES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def urank(monkeypatch, capsys):
    """Run the command line in this process; exit code (1 where a sentence was printed), stdout and stderr."""

    def run(*arguments, entry=cli.main):
        monkeypatch.setattr(sys, "argv", ["urank", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry()
        code = ended.value.code
        out, err = capsys.readouterr()
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code or 0, out, err)

    return run


def fails_in_one_sentence(result, *named):
    code, out, err = result
    assert code == 1 and out == ""
    assert err.startswith("urank: ") and err.count("\n") == 1
    assert all(name in err for name in named), err


class TestHelp:
    def test_of_the_module(self, urank):
        code, out, _ = urank("--help", entry=lambda: runpy.run_module("urank", run_name="__main__"))
        assert code == 0
        assert all(command in out for command in ("reproduce", "status", "publish", "show", "compare"))

    def test_of_a_command(self, urank):
        code, out, _ = urank("reproduce", "--help")
        assert code == 0
        assert all(option in out for option in ("--profile", "--only", "--device", "--seeds", "--time-budget"))

    def test_without_arguments(self, urank):
        code, out, err = urank()
        assert "reproduce" in out + err and "Traceback" not in err

    def test_of_an_unknown_command(self, urank):
        code, out, err = urank("reproduec")
        assert code == 2 and "reproduec" in err and "Traceback" not in err


class TestCompare:
    def test_of_a_record_with_itself(self, urank):
        path, (_, record) = finished()[0] / "record.json", finished()
        code, out, _ = urank("compare", path, path)
        settings, measured, ranks = out.strip().split("\n\n")
        assert code == 0 and ranks == f"ranks: 0 of {len(record.plan.layers)} differ"
        assert [line.split()[0] for line in settings.splitlines()] == ["one", "device"]
        rows = measured.splitlines()[1:]
        assert all(row.split()[-1] in ("0.00", "-") for row in rows)
        assert f"{record.accuracy.original:.2f}" in rows[0]

    def test_of_another_run(self, urank, tmp_path):
        path = finished()[0] / "record.json"
        other = json.loads(path.read_text())
        other["experiment"]["train"] |= dict(epochs=9)
        other["plan"]["layers"][2]["rank"] -= 1
        other["accuracy"]["original"] -= 1.5
        write_json(tmp_path / "other.json", other)
        code, out, _ = urank("compare", path, tmp_path / "other.json")
        settings, measured, ranks, layers = out.strip().split("\n\n")
        rank = finished()[1].plan.layers[2].rank
        assert code == 0 and ["train.epochs", "4", "9"] in [line.split() for line in settings.splitlines()]
        original = measured.splitlines()[1].split()
        assert original[0] == "original" and original[-1] == "-1.50"
        assert (
            ranks == "ranks: 1 of 9 differ"
            and layers.splitlines()[-1].split() == f"features.8 {rank} {rank - 1} -1".split()
        )

    def test_of_other_networks(self, urank):
        paths = (ROOT / "data" / "records" / "cifar10" / f"{name}.json" for name in ("vgg11", "resnet18"))
        fails_in_one_sentence(urank("compare", *paths), "cifar10/vgg11", "cifar10/resnet18", "different layers")


def test_a_wrong_profile_is_one_line_in_a_process_of_its_own(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "urank", "reproduce", "--profile", "nonesuch"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("urank: unknown profile 'nonesuch': choose one of cifar, cifar-cpu, imagenet, ")
    assert done.stderr.count("\n") == 1


class TestReproduce:
    def test_prints_the_record_that_is_there(self, urank, mine, runs):
        code, out, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--device", "cpu")
        assert code == 0
        first, second = out.splitlines()
        accuracy, plan = finished()[1].accuracy, finished()[1].plan
        assert first.startswith(f"digits10/vgg11: {accuracy.original:.2f} % -> {accuracy.decomposed:.2f} %")
        assert f"{accuracy.finetuned:.2f} % fine-tuned; MLU {100 * plan.mlu:.1f} %" in first
        assert second == f"  record: {runs / 'mine' / 'digits10' / 'vgg11' / 'record.json'}"

    def test_fresh_says_what_it_deletes_and_computes_it_again(self, urank, mine, runs, monkeypatch):
        folder = runs / "mine" / "digits10" / "vgg11"
        (folder / "marker").touch()
        write_json(folder / "train.json", read_json(folder / "train.json") | dict(seconds=3600.0))
        computed = []
        monkeypatch.setattr(profiles, "run", lambda *_, **__: computed.append(folder.exists()) or finished()[1])
        code, out, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--device", "cpu", "--fresh")
        assert code == 0 and computed == [False]
        assert out.startswith(f"--fresh deletes {folder}, which took 60 min to compute.")

    @pytest.mark.parametrize(
        ("missing", "action", "why"),
        [
            ([], "reuse   all", "of computation kept"),
            (["search.json"], "resume  search, spectra, decompose, finetune, latency", "search was not computed"),
        ],
    )
    def test_a_dry_run_says_what_would_run_and_why(self, urank, mine, runs, missing, action, why):
        folder = runs / "mine" / "digits10" / "vgg11"
        for name in missing:
            (folder / name).unlink()
        before = sorted(folder.rglob("*"))
        code, out, _ = urank("reproduce", "--profile", "mine", "--dry-run")
        header, first, second = out.splitlines()
        assert code == 0 and header.split() == ["experiment", "action", "stages", "why"]
        assert action in first and why in first
        assert second.split() == ["digits10/vgg11-s1", "run", "all", "not", "started"]
        assert sorted(folder.rglob("*")) == before

    def test_a_dry_run_names_results_of_other_code(self, urank, mine, runs, monkeypatch):
        monkeypatch.setattr(runner, "code_digest", lambda: "of now")
        _, kept, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--dry-run")
        assert "reuse" in kept and "train, calibrate" in kept and "by another version of the code" in kept
        _, fresh, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--dry-run", "--fresh")
        assert "run" in fresh and "--fresh deletes" in fresh
        mine.write_text(f"recompute_on_code_change: true\n{mine.read_text()}")
        _, again, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--dry-run")
        assert "the code has changed since, and profile mine recomputes" in again

    def test_a_dry_run_names_what_would_be_refused(self, urank, mine, runs):
        mine.write_text(mine.read_text().replace("tolerance: 1.25", "tolerance: 2.5"))
        _, out, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--dry-run")
        assert "refuse" in out and "was run with another tolerance" in out

    def test_a_dry_run_lists_first_what_others_start_from(self, urank, mine, runs):
        mine.write_text(mine.read_text().replace("seed: 1}", "variant: b, start: digits10/vgg11}"))
        (runs / "mine" / "digits10" / "vgg11" / "train.json").unlink()
        _, out, _ = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11@b", "--dry-run")
        assert [line.split()[:2] for line in out.splitlines()[1:]] == [
            ["digits10/vgg11", "resume"],
            ["digits10/vgg11@b", "run"],
        ]

    @pytest.mark.parametrize("pattern", ["vgg11/digits10", "*/vgg11"])
    def test_of_a_pattern(self, urank, mine, runs, pattern):
        code, out, _ = urank("reproduce", "--profile", "mine", "--only", pattern, "--seeds", "0", "--device", "cpu")
        assert code == 0 and out.startswith("digits10/vgg11: ") and len(out.splitlines()) == 2

    def test_stops_when_its_time_is_spent(self, urank, mine, runs):
        """What was run is read, what was not is not begun, and the exit status says that it is to be called again."""
        arguments = "reproduce", "--profile", "mine", "--seeds", "0,2", "--device", "cpu", "--time-budget", "0"
        code, out, err = urank(*arguments, "--only", "digits10/vgg11")
        assert code == 75 and err == ""
        assert out.splitlines()[0].startswith("digits10/vgg11: ")
        assert out.splitlines()[2:] == [
            "The time budget is used up: digits10/vgg11-s2: stage train was not started. "
            "To finish digits10/vgg11-s2, run the same command again."
        ]
        assert not (runs / "mine" / "digits10" / "vgg11-s2" / "train.json").exists()

    def test_goes_on_after_one_that_fails(self, urank, mine, runs):
        damaged = runs / "mine" / "digits10" / "vgg11-s2" / "train.json"
        damaged.parent.mkdir()
        damaged.write_text("{")
        arguments = "reproduce", "--profile", "mine", "--seeds", "2,0", "--device", "cpu", "--only", "digits10/vgg11"
        code, out, err = urank(*arguments)
        assert code == 1 and out.startswith("digits10/vgg11: ")
        first, second = err.splitlines()
        assert first.startswith("urank: digits10/vgg11-s2: ") and str(damaged) in first
        assert second == "urank: 1 of 2 experiments failed: digits10/vgg11-s2"

    @pytest.mark.parametrize("seeds", ["", "one", "1;2", "-1", "1,"])
    def test_of_no_seeds(self, urank, mine, seeds):
        fails_in_one_sentence(urank("reproduce", "--profile", "mine", "--seeds", seeds), "whole numbers", repr(seeds))

    def test_of_an_unknown_experiment(self, urank, mine, runs):
        result = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg99")
        fails_in_one_sentence(result, "digits10/vgg99", "digits10/vgg11")

    def test_of_a_file_that_is_no_yaml(self, urank, write):
        path = write("experiments: [\n")
        fails_in_one_sentence(urank("reproduce", "--profile", "mine"), str(path))

    def test_of_an_unknown_option_of_the_data(self, urank, mine, runs):
        mine.write_text(mine.read_text().replace("train: 400", "trian: 400"))
        shutil.rmtree(runs / "mine")
        fails_in_one_sentence(urank("reproduce", "--profile", "mine", "--device", "cpu"), "trian")

    @pytest.mark.parametrize("device", ["quantum", "cuda:x", "cuda"])
    def test_on_a_device_that_is_not_there(self, urank, mine, runs, device):
        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        (runs / "mine" / "digits10" / "vgg11" / "sweep.json").unlink()
        result = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--device", device)
        fails_in_one_sentence(result, device)

    def test_over_a_damaged_stage(self, urank, mine, runs):
        path = runs / "mine" / "digits10" / "vgg11" / "search.json"
        path.write_text("{")
        result = urank("reproduce", "--profile", "mine", "--only", "digits10/vgg11", "--device", "cpu")
        fails_in_one_sentence(result, str(path))


class TestStatus:
    @pytest.fixture(autouse=True)
    def cifar(self, mine):
        """The profile that a status names beside "mine", with the notebooks it shows."""
        shutil.copy(ROOT / "profiles" / "cifar.yaml", mine.parent)
        for notebook in (ROOT / "notebooks").glob("*.ipynb"):
            (mine.parent.parent / "notebooks" / notebook.name).touch()

    def test_tells_what_is_done(self, urank, mine, runs):
        (runs / "mine" / "digits10" / "vgg11" / "finetune.json").unlink()
        code, out, _ = urank("status", "--profile", "mine")
        paper, missing, stages = out.split("\n\n")
        header, *rows = (line.split() for line in stages.splitlines())
        assert code == 0
        assert "Table 3: VGG11, cifar10" in paper and "rows not run" in paper and "error of the paper's mean" in paper
        assert "Table 1: ViTB16" in missing and "ImageNet and about 98 GPU hours" in missing
        assert header == ["start", *STAGES]
        assert rows == [["digits10/vgg11", *["done"] * 6, "-", "done", "done"], ["digits10/vgg11-s1", *["-"] * 9]]

    def test_tells_from_where_an_experiment_starts_and_which_stages_it_has(self, urank, mine, runs):
        text = mine.read_text().replace("seed: 1}", "variant: b, start: digits10/vgg11, baseline: false}")
        mine.write_text(text)
        _, out, _ = urank("status", "--profile", "mine", "--seeds", "2")
        assert out.splitlines()[-1].split() == ["digits10/vgg11@b-s2", "digits10/vgg11-s2", *["-"] * 8]

    def test_of_an_unknown_profile(self, urank):
        fails_in_one_sentence(urank("status", "--profile", "nonesuch"), "nonesuch")


def test_the_status_of_imagenet_tells_the_recipes(urank):
    code, out, _ = urank("status", "--profile", "imagenet")
    [recipes] = [part for part in out.split("\n\n") if part.startswith("Fine-tuning on ImageNet")]
    rows = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in recipes.splitlines()[2:]}
    assert code == 0 and rows["epochs"] == ["300", "90"] and rows["ema decay"] == ["0.9", "none"]


class TestPublish:
    def test_prints_where_the_record_lies(self, urank, mine, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(profiles, "RECORDS", tmp_path / "records")
        code, out, _ = urank("publish", "vgg11/digits10", "--profile", "mine")
        path = tmp_path / "records" / "digits10" / "vgg11.json"
        assert (code, out) == (0, f"{path}\n")
        assert path.read_bytes() == (runs / "mine" / "digits10" / "vgg11" / "record.json").read_bytes()

    def test_notes_what_no_longer_stands_beside_it(self, urank, mine, runs, tmp_path, monkeypatch):
        records = tmp_path / "records"
        monkeypatch.setattr(profiles, "RECORDS", records)
        another = json.loads((runs / "mine" / "digits10" / "vgg11" / "record.json").read_text())
        another["experiment"] |= dict(seed=1, tolerance=3.0)
        Record.from_dict(another).save(records / "digits10" / "vgg11-s1.json")
        code, _, err = urank("publish", "vgg11/digits10", "--profile", "mine")
        assert code == 0 and err.startswith("note: digits10/vgg11-s1 has other settings") and err.count("\n") == 1

    def test_of_what_was_not_run(self, urank, mine, runs):
        fails_in_one_sentence(
            urank("publish", "digits10/vgg11-s1", "--profile", "mine"), "vgg11-s1: no record", str(runs)
        )

    def test_of_some_that_were_not_run(self, urank, mine, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(profiles, "RECORDS", tmp_path / "records")
        code, out, err = urank("publish", "digits10/vgg11-s1", "digits10/vgg11", "--profile", "mine")
        assert (code, out) == (1, f"{tmp_path / 'records' / 'digits10' / 'vgg11.json'}\n")
        assert err.startswith("urank: digits10/vgg11-s1: no record")


class TestShow:
    def test_prints_every_layer_and_the_totals(self, urank):
        folder, record = finished()
        code, out, _ = urank("show", folder / "record.json")
        header, *rows, total, how = out.splitlines()
        assert code == 0
        assert header.split() == ["layer", "d", "m", "weight_rank", "k_s", "k_t", "rank", "utilization", "correct"]
        for row, entry in zip(rows, record.plan.layers, strict=True):
            values = [entry.layer, entry.d, entry.m, entry.weight_rank, entry.k_s, entry.k_t, entry.rank]
            assert row.split() == [*map(str, values), f"{entry.utilization:.3f}", str(entry.correct)]
        assert total.endswith(f"params x {record.params_ratio:.2f}, MACs x {record.macs_ratio:.2f}")
        assert how.startswith(f"probes: fast, images in {record.plan.precision}, urank ")
        assert f"commit {record.made['train']['commit']} (" in how

    def test_says_what_an_old_record_does_not_tell(self, urank):
        code, out, _ = urank("show", ROOT / "data" / "records" / "cifar10" / "vgg11.json")
        assert code == 0 and out.splitlines()[-1] == (
            "probes: not recorded, images in not recorded, urank not recorded; commit not recorded (tree not recorded)"
        )

    def test_of_no_file(self, urank, tmp_path):
        fails_in_one_sentence(urank("show", tmp_path / "none.json"), "none.json")

    def test_of_a_folder(self, urank, tmp_path):
        fails_in_one_sentence(urank("show", tmp_path), str(tmp_path))

    def test_of_another_file(self, urank, tmp_path):
        (tmp_path / "other.json").write_text("{}")
        fails_in_one_sentence(urank("show", tmp_path / "other.json"), "other.json", "not a record")

    def test_of_a_record_with_another_plan(self, urank, tmp_path):
        (tmp_path / "old.json").write_text('{"experiment": {}, "plan": {}, "accuracy": {}, "cost": {}}')
        fails_in_one_sentence(urank("show", tmp_path / "old.json"), "old.json")
