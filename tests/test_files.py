import os
import pickle
import stat

import pytest
import torch
from conftest import Trap
from torch import nn

from urank.files import (
    atomic,
    delete_unfinished,
    read_checkpoint,
    read_json,
    read_weights,
    write_checkpoint,
    write_json,
    write_tensors,
    write_weights,
)


class Stop(Exception):
    pass


class TestAtomic:
    def test_moves_the_file_to_its_place(self, tmp_path):
        path = tmp_path / "new" / "folder" / "file"
        with atomic(path) as temporary:
            assert temporary.parent == path.parent  # a move inside one file system
            temporary.write_text("whole")
            assert not path.exists()
        assert path.read_text() == "whole"
        assert list(path.parent.iterdir()) == [path]

    def test_keeps_the_old_file_on_failure(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(Stop), atomic(path) as temporary:
            temporary.write_text("half")
            raise Stop
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_deletes_the_temporary_file_when_the_move_fails(self, tmp_path):
        (tmp_path / "file").mkdir()
        with pytest.raises(OSError), atomic(tmp_path / "file") as temporary:
            temporary.write_text("whole")
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]

    def test_delete_unfinished_deletes_only_temporary_files(self, tmp_path):
        others = [tmp_path / name for name in ("kept.json", ".hidden", "split/kept.safetensors")]
        left = []
        for path in others:
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
            with atomic(path) as temporary:
                temporary.write_text("y")
                left.append(temporary)
        for path in left:
            path.write_text("half")
        delete_unfinished(tmp_path)
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)

    def test_two_writers_of_one_file_use_two_temporary_files(self, tmp_path):
        path = tmp_path / "file"
        with atomic(path) as one, atomic(path) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "one"

    def test_gives_the_file_the_usual_mode(self, tmp_path):
        with open(tmp_path / "plain", "w"):
            pass
        write_json(tmp_path / "atomic", 1)
        modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "atomic")]
        assert modes[0] == modes[1]


class TestJson:
    @pytest.mark.parametrize("content", [{}, [1, 0.1, None, True, "Größe"], {"a": {"b": [1e-300, 10**20]}}])
    def test_is_equal_after_saving_and_loading(self, content, tmp_path):
        write_json(tmp_path / "a.json", content)
        assert read_json(tmp_path / "a.json") == content

    @pytest.mark.parametrize("content", [float("nan"), [float("inf")], {"a": float("-inf")}, {"a": torch.zeros(2)}])
    def test_refuses_other_content_and_keeps_the_old_file(self, content, tmp_path):
        path = tmp_path / "a.json"
        write_json(path, "old")
        with pytest.raises((ValueError, TypeError)):
            write_json(path, content)
        assert read_json(path) == "old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("damaged", [b"", b'{"a"', b"\xff\xfe"])
    def test_a_damaged_file_can_be_overwritten(self, damaged, tmp_path):
        path = tmp_path / "a.json"
        path.write_bytes(damaged)
        write_json(path, [1])
        assert read_json(path) == [1]

    def test_unchanged_content_keeps_the_date(self, tmp_path):
        path = tmp_path / "a.json"
        write_json(path, {"a": 1})
        os.utime(path, (0, 0))
        write_json(path, {"a": 1})
        assert path.stat().st_mtime == 0
        write_json(path, {"a": 2})
        assert path.stat().st_mtime > 0
        assert read_json(path) == {"a": 2}

    @pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": 1}x', b"\xff\xfe", b"\x00" * 20])
    def test_a_damaged_file_is_named(self, content, tmp_path):
        path = tmp_path / "a.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: not a valid JSON file"):
            read_json(path)


class TestCheckpoint:
    STATE = {"epoch": 3, "lr": 0.1, "name": "x", "model": {"weight": torch.arange(6.0).reshape(2, 3)}, "none": None}

    def test_is_equal_after_saving_and_loading(self, tmp_path):
        write_checkpoint(tmp_path / "a.pt", self.STATE)
        found = read_checkpoint(tmp_path / "a.pt")
        assert torch.equal(found["model"].pop("weight"), self.STATE["model"]["weight"])
        assert found == {**self.STATE, "model": {}}

    def test_of_an_optimizer_is_equal_after_loading(self, tmp_path):
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        write_checkpoint(tmp_path / "a.pt", optimizer.state_dict())
        found = read_checkpoint(tmp_path / "a.pt")
        assert torch.equal(found["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])

    @pytest.mark.parametrize("share", [0, 0.3, 0.99])
    def test_a_truncated_file_is_named(self, share, tmp_path):
        path = tmp_path / "a.pt"
        write_checkpoint(path, self.STATE)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"a\.pt: not a readable checkpoint"):
            read_checkpoint(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_nothing_is_unpickled(self, tmp_path):
        trap = Trap(tmp_path / "sprung")
        torch.save(trap, tmp_path / "torch")
        (tmp_path / "pickle").write_bytes(pickle.dumps(trap))
        for name in ("torch", "pickle"):
            with pytest.raises(ValueError, match=name):
                read_checkpoint(tmp_path / name)
        assert not trap.path.exists()

    def test_a_failed_write_keeps_the_old_file(self, tmp_path):
        path = tmp_path / "a.pt"
        write_checkpoint(path, self.STATE)
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            write_checkpoint(path, {"a": lambda: 0})
        assert read_checkpoint(path)["epoch"] == 3
        assert list(tmp_path.iterdir()) == [path]


class TestWeights:
    def test_are_equal_after_saving_and_loading(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        write_weights(tmp_path / "a.safetensors", model)
        found, state = read_weights(tmp_path / "a.safetensors"), model.state_dict()
        assert sorted(found) == sorted(state)
        assert all(torch.equal(found[name], value) for name, value in state.items())
        assert all(found[name].dtype == value.dtype for name, value in state.items())

    def test_tensors_that_need_gradients_or_are_views(self, tmp_path):
        x = torch.randn(4, 6, requires_grad=True)
        write_tensors(tmp_path / "a.safetensors", {"x": x.T, "double": x.double()[::2]})
        found = read_weights(tmp_path / "a.safetensors")
        assert torch.equal(found["x"], x.T)
        assert torch.equal(found["double"], x.double()[::2])

    def test_of_a_module_at_two_places(self, tmp_path):
        norm = nn.BatchNorm1d(3)
        model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
        write_weights(tmp_path / "a.safetensors", model)
        found, state = read_weights(tmp_path / "a.safetensors"), model.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)

    @pytest.mark.parametrize("share", [0, 0.5, 0.999])
    def test_a_truncated_file_is_named(self, share, tmp_path):
        path = tmp_path / "a.safetensors"
        write_weights(path, nn.Linear(30, 30))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"a\.safetensors: damaged weights"):
            read_weights(path)
