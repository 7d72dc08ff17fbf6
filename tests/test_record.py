from dataclasses import replace

import pytest
from conftest import TINY, finished

from urank.files import read_json, write_json
from urank.reproduction.experiment import Experiment
from urank.reproduction.paths import RECORDS
from urank.reproduction.record import NOT_RECORDED, Record


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_records_are_written_as_they_were_read(path, tmp_path):
    """Except for the experiment, which gets defaults for recipe fields that did not exist then."""
    Record.load(path).save(tmp_path / "record.json")
    before, after = read_json(path), read_json(tmp_path / "record.json")
    assert list(after) == list(before)
    assert Experiment.from_dict(before.pop("experiment")) == Experiment.from_dict(after.pop("experiment"))
    assert after == before


def test_fields_are_typed():
    folder, record = finished()
    loaded = Record.load(folder / "record.json")
    assert loaded == record and loaded.experiment == TINY
    assert loaded.plan.total == 80 and loaded.sweep[0].layer == "features.8" and loaded.throughput[0].batch == 1
    assert loaded.params_ratio == loaded.cost.compact.params / loaded.cost.original.params


def test_what_an_older_record_lacks_is_said():
    record = finished()[1]
    made = {stage: {} for stage in record.made}
    older = replace(record, made=made)
    assert older.date == NOT_RECORDED and older.devices() == {NOT_RECORDED}
    newer = record.to_dict()
    newer["made"]["train"]["commit"] = "0123abc"
    assert Record.from_dict(newer).made["train"]["commit"] == "0123abc"


@pytest.mark.parametrize("change", [dict(plan={}), dict(accuracy={}), dict(cost=None), dict(sweep=[{}])])
def test_a_damaged_record_is_refused(change, tmp_path):
    write_json(tmp_path / "record.json", finished()[1].to_dict() | change)
    with pytest.raises(ValueError, match="record.json: not a record that this version can read"):
        Record.load(tmp_path / "record.json")
