import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY, finished

from urank import models
from urank.factorize import count_cost
from urank.files import read_weights
from urank.reproduction import profiles
from urank.reproduction.experiment import as_json, fresh_network
from urank.reproduction.profiles import folder_of, load_profile, recorded, reproduce, runs_folder
from urank.reproduction.run_folder import calibrated_grams

NAMES = sorted(path.stem for path in profiles.PROFILES.glob("*.yaml"))
ENTRY = "{network: vgg11, dataset: digits10, train: {epochs: 1}, finetune: {epochs: 1}"
WHOLE = f"experiments:\n  - {ENTRY}}}\nnotebooks: {{}}\n"


def listed(*additions):
    """A profile of `ENTRY` with each of these additions."""
    return "experiments:\n" + "".join(f"  - {ENTRY}, {addition}}}\n" for addition in additions) + "notebooks: {}\n"


FAULTS = {
    "no yaml": ("experiments: [", "line 1"),
    "empty": ("", "a profile has the keys"),
    "text": ("just text", "a profile has the keys"),
    "unknown key": (WHOLE + "notes: []\n", "a profile has the keys"),
    "missing key": ("experiments: []\n", "a profile has the keys"),
    "empty experiments": ("experiments:\nnotebooks: {}\n", "experiments"),
    "experiments no list": ("experiments: 3\nnotebooks: {}\n", "experiments"),
    "empty notebooks": (WHOLE.replace("{}", ""), "notebooks"),
    "notebooks no mapping": (WHOLE.replace("{}", "[page]"), "notebooks"),
    "unknown notebook": (WHOLE.replace("{}", "{missing: [digits10/vgg11]}"), "'missing'"),
    "notebook of an unknown experiment": (WHOLE.replace("{}", "{page: [digits10/vgg13]}"), "'digits10/vgg13'"),
    "notebook without a list": (WHOLE.replace("{}", "{page: digits10/vgg11}"), "list"),
    "notebook of nothing": (WHOLE.replace("{}", "{page: }"), "page"),
    "unknown key of an experiment": (f"experiments:\n  - {ENTRY}, colour: red}}\nnotebooks: {{}}\n", "colour"),
    "recompute with no truth value": (f"recompute_on_code_change: often\n{WHOLE}", "must be true or false"),
    "one name twice": (f"experiments:\n  - {ENTRY}}}\n  - {ENTRY}, width: 2}}\nnotebooks: {{}}\n", "two experiments"),
    "unknown key of a recipe": (WHOLE.replace("finetune: {epochs: 1", "finetune: {epochs: 1, rate: 1"), "rate"),
    "unknown start": (listed("start: digits10/vgg13"), "starts from 'digits10/vgg13', which the profile does not run"),
    "start of another width": (
        listed("width: 0.5", "variant: b, start: digits10/vgg11"),
        "cannot start from digits10/vgg11 .vgg11, width 0.5",
    ),
    "start from itself": (listed("start: digits10/vgg11"), "each other: digits10/vgg11 from digits10/vgg11"),
    "starts in a circle": (
        listed("start: digits10/vgg11@b", "variant: b, start: digits10/vgg11"),
        "each other: digits10/vgg11 from digits10/vgg11@b from digits10/vgg11",
    ),
    "held out too late": (listed("holdout: 5", "variant: b, start: digits10/vgg11, holdout: 6"), "holds out 6 images"),
    "held out too late, further back": (
        listed("variant: a", "dataset: digits100, start: digits10/vgg11@a", "holdout: 6, start: digits100/vgg11"),
        "digits10/vgg11 holds out 6 images, but digits10/vgg11@a was trained on some of them",
    ),
    "variant like a seed": (listed("variant: b-s1"), "variant"),
    "unknown network": (WHOLE.replace("vgg11", "vgg12"), "vgg12"),
    "unknown data set": (WHOLE.replace("digits10", "mnist"), "mnist"),
}


class TestCommittedProfiles:
    def test_are_there(self):
        assert {"smoke", "quick", "cifar", "imagenet"} <= set(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_name_what_exists(self, name):
        profile = load_profile(name)
        assert profile.name == name and profile.experiments
        for key, experiment in profile.experiments.items():
            assert key == experiment.name
            side = (
                models.preprocessing(experiment.network, experiment.pretrained)["size"] if experiment.pretrained else 32
            )
            with torch.device("meta"):
                network = fresh_network(experiment, fetch=False)
                assert count_cost(network, (3, side, side)).params > 0
            if experiment.dataset.startswith("digits"):
                assert not experiment.train.flip and not experiment.finetune.flip  # a mirrored digit is none

    @pytest.mark.parametrize("name", NAMES)
    def test_say_what_every_notebook_shows(self, name):
        notebooks = load_profile(name).notebooks
        assert set(notebooks) == {path.stem for path in profiles.NOTEBOOKS.glob("*.ipynb")}
        measuring = [
            page for page in notebooks if page.startswith(("figure", "table", "protocol")) and "table2" not in page
        ]
        shown = {page: notebooks[page] or notebooks[f"{page}_details"] for page in measuring}
        assert all(shown.values())  # the others run nothing

    @pytest.mark.parametrize("name", NAMES)
    def test_sweep_what_figure_1_draws(self, name):
        profile = load_profile(name)
        assert all(profile.experiments[shown].sweep for shown in profile.notebooks["figure1_spectra"])

    @pytest.mark.parametrize("measured", recorded(), ids=lambda measured: measured.experiment.name)
    def test_hold_the_experiment_of_every_committed_record(self, measured):
        """So that one command makes it again."""
        listed = [load_profile(name) for name in NAMES]
        name = measured.experiment.name
        experiments = [profile.find(name) for profile in listed if re.sub(r"-s\d+$", "", name) in profile.experiments]
        assert as_json(asdict(measured.experiment)) in [as_json(asdict(one)) for one in experiments]


class TestLoadProfile:
    def test_of_no_file_names_those_that_are(self, write):
        write(WHOLE)
        with pytest.raises(ValueError, match="unknown profile 'yours': choose one of mine"):
            load_profile("yours")

    def test_reads_what_is_written(self, mine):
        profile = load_profile("mine")
        assert list(profile.experiments) == ["digits10/vgg11", "digits10/vgg11-s1"]
        assert profile.experiments["digits10/vgg11"] == TINY
        assert profile.notebooks == {"page": ["digits10/vgg11"]}

    def test_starts_from_a_valid_one(self, write):
        """What the refusals below are changed from."""
        write(WHOLE)
        assert list(load_profile("mine").experiments) == ["digits10/vgg11"]

    @pytest.mark.parametrize("text, named", FAULTS.values(), ids=FAULTS)
    def test_names_the_file_and_the_fault(self, write, text, named):
        path = write(text)
        with pytest.raises(ValueError, match=named) as caught:
            load_profile("mine")
        assert str(path) in str(caught.value)


class TestNames:
    @pytest.fixture
    def profile(self, write):
        write(listed("width: 0.5", "variant: probe, width: 0.5, start: digits10/vgg11", "seed: 4, variant: four"))
        return load_profile("mine")

    def test_find_what_is_listed_and_other_seeds_of_it(self, profile):
        assert profile.find("digits10/vgg11@probe") is profile.experiments["digits10/vgg11@probe"]
        seeded = profile.find("digits10/vgg11@probe-s2")
        assert (seeded.seed, seeded.start, seeded.name) == (2, "digits10/vgg11-s2", "digits10/vgg11@probe-s2")
        assert profile.find(seeded.start) == replace(profile.experiments["digits10/vgg11"], seed=2)
        assert profile.find("digits10/vgg11@four").seed == 0

    @pytest.mark.parametrize(
        "name", ["digits10/vgg13-s1", "digits10/vgg11-s01", "digits10/vgg11-s0", "digits10/vgg11-s"]
    )
    def test_find_nothing_else(self, profile, name):
        with pytest.raises(ValueError, match=f"'mine' has no experiment '{name}': choose one of digits10/vgg11, "):
            profile.find(name)

    @pytest.mark.parametrize(
        "patterns, names",
        [
            ([], ["vgg11", "vgg11@probe", "vgg11@four-s4"]),
            (["digits10/vgg11"], ["vgg11"]),
            (["vgg11/digits10"], ["vgg11"]),
            (["vgg11@*/digits10"], ["vgg11@probe", "vgg11@four-s4"]),
            (["*@probe", "digits10/*"], ["vgg11@probe", "vgg11", "vgg11@four-s4"]),
            (["digits10/vgg11-s7"], ["vgg11-s7"]),
        ],
    )
    def test_match_patterns_in_either_order(self, profile, patterns, names):
        assert profile.names(patterns) == [f"digits10/{name}" for name in names]

    def test_nothing_matches(self, profile):
        with pytest.raises(ValueError, match="no experiment 'cifar10/.'"):
            profile.names(["digits10/*", "cifar10/*"])

    def test_with_seeds(self, profile):
        names = ["vgg11@probe", "vgg11@probe-s1", "vgg11@four", "vgg11@four-s1"]
        assert profile.names(["*@*"], [0, 1]) == [f"digits10/{name}" for name in names]


class TestStart:
    @pytest.fixture
    def chain(self, write, tmp_path, monkeypatch):
        monkeypatch.setenv("URANK_RUNS", str(tmp_path / "runs"))
        recipes = "train: {epochs: 0, batch_size: 10}, finetune: {epochs: 0, batch_size: 10}"
        entry = f"network: vgg11, dataset: digits10, width: 0.125, data: {{train: 20, test: 10}}, {recipes}"
        write(
            f"experiments:\n  - {{{entry}, variant: b, start: digits10/vgg11, tolerance: 50}}\n  - {{{entry}}}\n"
            "notebooks: {}\n"
        )
        return tmp_path / "runs" / "mine" / "digits10"

    def test_is_run_first(self, chain):
        record = reproduce("mine", "digits10/vgg11@b-s3", "cpu")
        assert sorted(path.name for path in chain.glob("v*")) == ["vgg11-s3", "vgg11@b-s3"]
        assert record.experiment.start == "digits10/vgg11-s3" and record.experiment.tolerance == 50
        weights = [read_weights(chain / name / "original.safetensors") for name in ("vgg11-s3", "vgg11@b-s3")]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


class TestPublish:
    def test_copies_the_record_to_where_it_is_found(self, mine, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(profiles, "RECORDS", tmp_path / "records")
        assert profiles.publish("mine", "digits10/vgg11") == tmp_path / "records" / "digits10" / "vgg11.json"
        assert recorded("digits10/*") == [finished()[1]]

    def test_of_what_was_not_run(self, mine, runs):
        with pytest.raises(ValueError, match="digits10/vgg11-s1 has no record yet; finish it"):
            profiles.publish("mine", "digits10/vgg11-s1")


def test_records_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "RECORDS", tmp_path / "records")
    with pytest.raises(FileNotFoundError, match="data/records; work from a checkout"):
        recorded()


class TestRuns:
    def test_lie_in_the_repository_or_where_the_variable_says(self, monkeypatch, tmp_path):
        monkeypatch.delenv("URANK_RUNS", raising=False)
        assert runs_folder() == profiles.ROOT / "runs"
        monkeypatch.setenv("URANK_RUNS", str(tmp_path))
        assert folder_of("smoke", "digits10/vgg11") == tmp_path / "smoke" / "digits10" / "vgg11"

    def test_of_an_experiment_the_profile_does_not_have(self, mine, runs):
        with pytest.raises(
            ValueError, match="'mine' has no experiment 'digits10/vgg13': choose one of digits10/vgg11, "
        ):
            reproduce("mine", "digits10/vgg13")

    def test_are_read_where_they_are(self, mine, runs):
        folder, record = finished()
        assert reproduce("mine", "digits10/vgg11", "cpu") == record
        assert profiles.live_records("mine", "page") == [record]
        assert folder_of("mine", "digits10/vgg11") == runs / "mine" / "digits10" / "vgg11"

    def test_leave_a_network_and_its_gram_matrices(self, mine, runs):
        folder, record = finished()
        network, grams = profiles.trained_network("mine", record), profiles.calibrated_grams("mine", record)
        assert count_cost(network).params == record.cost.original.params
        assert list(grams) == [entry.layer for entry in record.plan.layers]
        for layer, gram in calibrated_grams(folder).items():
            assert grams[layer].equal(gram) and gram.shape == (record.plan[layer].d,) * 2

    def test_notebook_without_an_experiment(self, mine, runs):
        with pytest.raises(ValueError, match="'other'.*page"):
            profiles.live_records("mine", "other")


class TestRecorded:
    @pytest.fixture
    def kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(profiles, "RECORDS", tmp_path)
        for name in ("cifar10/vgg11", "cifar10/vgg13", "cifar100/vgg11", "imagenet-1k/timm/vgg13"):
            finished()[1].save(tmp_path / f"{name}.json")
        return tmp_path

    @pytest.mark.parametrize(
        "pattern, count",
        [
            ("*/*", 4),
            ("cifar10/*", 2),
            ("cifar10/vgg11", 1),
            ("imagenet*/*", 1),
            ("*/timm/*", 1),
            ("*vgg11", 2),
            ("x*", 0),
        ],
    )
    def test_are_chosen_by_name(self, kept, pattern, count):
        assert recorded(pattern) == [finished()[1]] * count

    def test_come_by_name_with_numbers_as_numbers(self, tmp_path, monkeypatch):
        monkeypatch.setattr(profiles, "RECORDS", tmp_path)
        names = [("cifar10", "resnet18"), ("cifar10", "resnet101"), ("cifar10", "vgg11"), ("cifar100", "resnet18")]
        for dataset, network in names[::-1]:
            experiment = replace(TINY, dataset=dataset, network=network, data={}, sweep=())
            replace(finished()[1], experiment=experiment).save(tmp_path / dataset / f"{network}.json")
        experiments = [record.experiment for record in recorded()]
        assert [(one.dataset, one.network) for one in experiments] == names

    def test_damaged_ones_are_named(self, kept):
        (kept / "cifar10" / "vgg13.json").write_text("{")
        with pytest.raises(ValueError, match="vgg13.json"):
            recorded("cifar10/*")
