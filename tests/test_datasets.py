import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trap
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from urank import datasets
from urank.datasets import CLASSES, check_options, load
from urank.datasets import digits as drawing

DIGITS = ("digits10", "digits100")
SMALL = dict(train=300, test=200)

small = functools.cache(functools.partial(load, **SMALL))  # data sets are immutable


@functools.cache
def sources():
    """scikit-learn's digits: ink (1797, 8, 8) in 0..1, and their labels."""
    stored = load_digits()
    return torch.from_numpy(stored.images).float() / 16, torch.from_numpy(stored.target)


def drawn(classes: int, count: int, glyphs, pool, seed: int = 0):
    """Scenes (n, 32, 32, 3) with any ink, and their labels; scenes of one seed differ only in the ink."""
    generator = torch.Generator().manual_seed(seed)
    labels = drawing.balanced_labels(classes, count, generator)
    return drawing.draw_scenes(labels, classes, glyphs, sources()[1], pool, generator).int(), labels


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGITS)
def test_digits_have_the_documented_shapes_and_types(name):
    dataset = small(name)
    assert (dataset.name, dataset.classes) == (name, CLASSES[name])
    for split, count in ((dataset.train, 300), (dataset.test, 200)):
        assert split.images.shape == (count, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.shape == (count,) and split.labels.dtype == torch.int64


@pytest.mark.parametrize("name", DIGITS)
def test_digits_depend_on_the_seed_only(name):
    first, again, other = small(name), load(name, **SMALL), load(name, **SMALL, seed=1)
    for part in ("train", "test"):
        one, two, three = (getattr(dataset, part) for dataset in (first, again, other))
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
        assert not torch.equal(one.images, three.images) and not torch.equal(one.labels, three.labels)


def test_drawing_leaves_the_global_random_state():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load("digits10", train=10, test=10)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_training_images_do_not_depend_on_the_number_of_test_images():
    assert torch.equal(load("digits10", train=300, test=10).train.images, small("digits10").train.images)
    assert torch.equal(load("digits10", train=10, test=200).test.images, small("digits10").test.images)


@pytest.mark.parametrize("name", DIGITS)
def test_the_first_images_are_balanced_over_classes(name):
    classes = CLASSES[name]
    for split in (small(name).train, small(name).test):
        for rounds in (1, 2):
            counts = split.take(rounds * classes).labels.bincount(minlength=classes)
            assert counts.tolist() == [rounds] * classes
    uneven = load(name, train=classes + 7, test=classes).train.labels.bincount(minlength=classes)
    assert sorted(uneven.tolist()) == [1] * (classes - 7) + [2] * 7


def test_source_digits_are_split_without_overlap_and_stratified():
    glyphs, digits = sources()
    train, test = drawing.split_sources(digits)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(digits)))
    shares = digits[test].bincount(minlength=10) / digits.bincount(minlength=10)
    assert torch.all((shares - 0.25).abs() < 0.01)
    pixels = [{glyph.numpy().tobytes() for glyph in glyphs[pool]} for pool in (train, test)]
    assert pixels[0].isdisjoint(pixels[1])


@pytest.mark.parametrize("name", DIGITS)
def test_images_contain_only_source_digits_of_their_own_part(name, monkeypatch):
    # Without the source digits of the test part every test image must change, and no training image.
    stored = load_digits()
    stored.images[drawing.split_sources(torch.from_numpy(stored.target))[1].numpy()] = 0
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: stored)
    wiped = load(name, **SMALL)
    assert torch.equal(wiped.train.images, small(name).train.images)
    assert (wiped.test.images != small(name).test.images).flatten(1).any(1).all()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("digit", [0, 7])
def test_a_digit_appears_where_its_label_says(classes, digit):
    # Scenes with the ink of one digit and scenes without ink differ only where that digit is drawn.
    glyphs, digits = sources()
    pool = drawing.split_sources(digits)[0]
    only = glyphs * (digits == digit).view(-1, 1, 1)
    scenes, labels = drawn(classes, 200, only, pool)
    empty, _ = drawn(classes, 200, torch.zeros_like(glyphs), pool)
    ink = ((scenes - empty).abs().amax(3) > 24).float()
    units, tens = labels % 10 == digit, (labels // 10 == digit) if classes == 100 else torch.zeros(200, dtype=bool)
    assert torch.equal(ink.sum((1, 2)) > 15, units | tens)
    column = (ink.sum(1) * torch.arange(32)).sum(1) / ink.sum((1, 2))
    if classes == 100:
        assert (column[tens & ~units] < 14).all() and (column[units & ~tens] > 18).all()
    else:
        assert ((column[units] > 6) & (column[units] < 26)).all()


def test_colours_do_not_reveal_the_digit():
    # Mean colours differ between images, not between classes.
    means = small("digits10").train.images.float().mean((2, 3))
    labels = small("digits10").train.labels
    between = torch.stack([means[labels == digit].mean(0) for digit in range(10)]).var(0)
    assert (means.std(0) > 30).all()
    assert (between < 3 * means.var(0) / 30).all()  # 30 images per class: chance alone gives 1/30


@pytest.mark.parametrize("name, counts", [("digits10", (9, 10)), ("digits100", (100, 99)), ("digits10", (-5, 10))])
def test_too_few_digits_are_refused(name, counts):
    with pytest.raises(ValueError, match=f"{name}: {counts[0]} training and {counts[1]} test images cannot"):
        load(name, train=counts[0], test=counts[1])


# --- names, options, batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, option", [("digits10", "folder"), ("cifar10", "train")])
def test_an_unknown_name_or_option_is_refused(name, option):
    with pytest.raises(ValueError, match="'mnist'.* digits10, digits100, cifar10, cifar100"):
        load("mnist")
    with pytest.raises(ValueError, match=option):
        load(name, **{option: 1})
    with pytest.raises(ValueError, match="digits10: no such option: name"):
        check_options("digits10", dict(name="digits100"))


def test_statistics_are_computed_from_the_training_pixels():
    dataset = small("digits10")
    pixels = dataset.train.images.double().permute(1, 0, 2, 3).flatten(1) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(1, correction=0), rtol=1e-10)


def test_batches_are_normalized_complete_and_repeatable():
    dataset = small("digits10")
    batches = dataset.batches(dataset.train, batch_size=128)
    seen = list(batches)
    assert [len(labels) for _, labels in seen] == [128, 128, 44] and len(batches) == 3
    images, labels = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
    assert torch.equal(labels, dataset.train.labels)
    assert images.dtype == torch.float32 and seen[0][0].is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 2, 3)), 1, atol=1e-4)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(seen, batches))


def test_batches_can_have_another_order_and_other_sizes():
    dataset = small("digits10")
    order = torch.randperm(200)
    images, labels = (torch.cat(parts) for parts in zip(*dataset.batches(dataset.test)))
    batches = dataset.batches(dataset.test, 64).in_order(order, [1, 99, 100])
    assert [len(labels) for _, labels in batches] == [1, 99, 100] and len(batches) == 3
    assert torch.cat([x for x, _ in batches]).equal(images[order])
    assert torch.cat([y for _, y in batches]).equal(labels[order])
    assert (batches.total, batches.nbytes) == (200, images.nbytes) and batches.split is dataset.test
    backwards = torch.arange(99, -1, -1)
    half = batches.in_order(backwards, [64, 36])
    assert torch.cat([x for x, _ in half]).equal(images[order[backwards]])
    assert half.labels.equal(labels[order[backwards]]) and half.total == 100
    assert dataset.test.take(2).labels.equal(labels[:2]) and len(dataset.test.take(None)) == 200


# --- CIFAR: .npz files -----------------------------------------------------------------------------------------------


def made_up(classes: int = 10, extra: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """A small data set in the Keras layout: random pixels, at least one image per class."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 2 * classes + extra), ("test", classes + extra)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = (rng.permutation(n) % classes).astype(np.uint8)[:, None]
    return arrays


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("flat", [False, True])
def test_an_npz_file_is_read_pixel_by_pixel(tmp_path, monkeypatch, name, save, flat):
    arrays = made_up(CLASSES[name])
    labels = {key: arrays[key].reshape(-1).astype(np.int64) for key in ("y_train", "y_test")}
    save(tmp_path / f"{name}.npz", **arrays | (labels if flat else {}))
    monkeypatch.setenv("URANK_DATA", str(tmp_path))
    dataset = load(name)
    assert dataset.classes == CLASSES[name]
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        assert split.images.is_contiguous() and split.labels.dtype == torch.int64
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), arrays[f"x_{part}"])
        assert np.array_equal(split.labels.numpy(), arrays[f"y_{part}"][:, 0])


def test_data_folder_is_the_environment_variable_or_data(tmp_path, monkeypatch):
    monkeypatch.setenv("URANK_DATA", str(tmp_path))
    assert datasets.data_folder() == tmp_path
    for unset in (lambda: monkeypatch.setenv("URANK_DATA", ""), lambda: monkeypatch.delenv("URANK_DATA")):
        unset()
        assert datasets.data_folder() == Path("data")


BAD_CONTENT = {
    "float images": (dict(x_train=lambda x: x / 255), "training part: images must be uint8"),
    "channels first": (dict(x_test=lambda x: x.transpose(0, 3, 1, 2)), r"test part: images .*\(13, 3, 32, 32\)"),
    "other size": (dict(x_train=lambda x: x[:, :28, :28]), r"training part: images .*\(23, 28, 28, 3\)"),
    "grey": (dict(x_train=lambda x: x[..., 0]), r"training part: images .*\(23, 32, 32\)"),
    "a label short": (dict(y_test=lambda y: y[:-1]), r"test part: labels must be .*\(12, 1\)"),
    "one-hot labels": (dict(y_train=lambda y: np.eye(10, dtype=int)[y[:, 0]]), r"training part: labels .*\(23, 10\)"),
    "float labels": (dict(y_train=lambda y: y.astype(float)), "training part: labels must be integers.*float64"),
    "label 10": (
        dict(y_train=lambda y: np.where(y == 3, 10, y)),
        r"training part: labels must include all of 0 to 9.*0 to 10",
    ),
    "label -1": (dict(y_test=lambda y: y.astype(int) - 1), r"test part: labels must include all of 0 to 9.*-1 to 8"),
    "no threes": (
        dict(y_test=lambda y: np.where(y == 3, 2, y)),
        "test part: labels must include all of 0 to 9, found 9",
    ),
    "nothing": (dict(x_test=lambda x: x[:0], y_test=lambda y: y[:0]), "test part: labels must include all.*none"),
}


@pytest.mark.parametrize("changes, message", BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_content_is_refused(tmp_path, changes, message):
    arrays = made_up()
    np.savez(tmp_path / "cifar10.npz", **arrays | {key: change(arrays[key]) for key, change in changes.items()})
    with pytest.raises(ValueError, match=rf"cifar10\.npz, {message}"):
        load("cifar10", folder=tmp_path)


@pytest.mark.parametrize("name, classes", [("cifar10", 100), ("cifar100", 10)])
def test_cifar10_and_cifar100_are_told_apart(tmp_path, name, classes):
    np.savez(tmp_path / f"{name}.npz", **made_up(classes))
    with pytest.raises(ValueError, match=f"all of 0 to {CLASSES[name] - 1}, found {classes} "):
        load(name, folder=tmp_path)


def test_missing_arrays_are_named(tmp_path):
    arrays = made_up()
    np.savez(tmp_path / "cifar10.npz", x_train=arrays["x_train"], y_test=arrays["y_test"])
    with pytest.raises(ValueError, match=r"cifar10\.npz: no array y_train, x_test; "):
        load("cifar10", folder=tmp_path)


DAMAGE = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "last byte missing": lambda whole: whole[:-1],
    "a byte flipped": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    "a web page": lambda whole: b"<!DOCTYPE html><title>404</title>",
    "a bare array": lambda whole: whole[whole.index(b"\x93NUMPY") :][:70000],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_npz_file_is_named(tmp_path, damage):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **made_up())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cifar10\.npz: not a readable \.npz file .* copy it again") as caught:
        load("cifar10", folder=tmp_path)
    assert caught.value.__cause__ is not None


def test_nothing_in_an_npz_file_is_unpickled(tmp_path):
    arrays = made_up() | dict(y_train=np.array([Trap(tmp_path / "sprung")], dtype=object))
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(ValueError, match="not a readable"):
        load("cifar10", folder=tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("URANK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; create it, or set URANK_DATA .*cifar10.npz"):
        load("cifar10")
    assert not (tmp_path / "nowhere").exists()


# --- CIFAR: torchvision's files --------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Every connection is refused."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # forget the proxies of an earlier request


def small_archive(arrays: dict[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """`arrays` in an archive with the layout of CIFAR-100, and the MD5 sums of its files."""
    files = {"meta": dict(fine_label_names=[f"class {i}" for i in range(100)])}
    for part in ("train", "test"):
        rows = arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        files[part] = dict(data=rows, fine_labels=arrays[f"y_{part}"][:, 0].tolist())
    contents = {name: pickle.dumps(value) for name, value in files.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue(), {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A folder on a local server with a small CIFAR-100 that torchvision accepts."""
    folder = tmp_path_factory.mktemp("server")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    content, sums = small_archive(made_up(100))
    (folder / CIFAR100.filename).write_bytes(content)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(urllib.request, "_opener", None)
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{running.server_port}/{CIFAR100.filename}")
        monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(content).hexdigest())
        monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | dict(md5=sums["meta"]))
        yield folder
        running.shutdown()


def assert_is_made_up(dataset):
    arrays = made_up(100)
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), arrays[f"x_{part}"])
        assert np.array_equal(split.labels.numpy(), arrays[f"y_{part}"][:, 0])


@pytest.mark.parametrize("name, source", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_without_files_and_network_the_error_says_what_to_do(tmp_path, offline, name, source):
    with pytest.raises(ConnectionError) as caught:
        load(name, folder=tmp_path)
    for part in (str(tmp_path), f"{name}.npz", source.base_folder, source.url, "URANK_DATA", "refused"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_missing_files_are_downloaded_once(tmp_path, server):
    assert_is_made_up(load("cifar100", folder=tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["cifar-100-python"]
    (server / CIFAR100.filename).unlink()
    assert_is_made_up(load("cifar100", folder=tmp_path))


@pytest.mark.parametrize("served", [b"", b"half an archive", None], ids=["empty", "half", "not found"])
def test_a_failed_download_leaves_nothing_behind(tmp_path, server, served):
    (server / CIFAR100.filename).unlink()
    if served is not None:
        (server / CIFAR100.filename).write_bytes(served)
    with pytest.raises(ConnectionError, match="could not be downloaded") as caught:
        load("cifar100", folder=tmp_path)
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_an_archive_in_the_folder_needs_no_network(tmp_path, server, offline):
    (server / CIFAR100.filename).rename(tmp_path / CIFAR100.filename)
    assert_is_made_up(load("cifar100", folder=tmp_path))
    assert {entry.name for entry in tmp_path.iterdir()} == {CIFAR100.filename, "cifar-100-python"}


def test_a_damaged_archive_is_named_and_kept(tmp_path, server):
    archive = tmp_path / CIFAR100.filename
    archive.write_bytes(b"half an archive")
    with pytest.raises(ValueError, match=rf"{archive.name}: .*wrong checksum.*delete it"):
        load("cifar100", folder=tmp_path)
    assert archive.read_bytes() == b"half an archive" and list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("name, source", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_a_damaged_folder_is_named(tmp_path, offline, name, source):
    (tmp_path / source.base_folder).mkdir()
    (tmp_path / source.base_folder / source.train_list[0][0]).write_bytes(b"half a batch")
    with pytest.raises(ValueError, match=rf"{source.base_folder}: .*wrong checksum; delete it") as caught:
        load(name, folder=tmp_path)
    assert caught.value.__cause__ is not None


def test_an_npz_file_is_preferred_to_torchvisions_folder(tmp_path, offline):
    (tmp_path / "cifar-100-python").mkdir()
    np.savez(tmp_path / "cifar100.npz", **made_up(100))
    assert_is_made_up(load("cifar100", folder=tmp_path))


# --- the real CIFAR --------------------------------------------------------------------------------------------------

PUBLISHED = {  # mean and standard deviation of the training pixels
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@pytest.mark.parametrize("name, source", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_the_real_cifar(name, source):
    folder = datasets.data_folder()
    if not (folder / f"{name}.npz").exists() and not (folder / source.base_folder).exists():
        pytest.skip(f"{folder} holds neither {name}.npz nor {source.base_folder}/; set URANK_DATA")
    dataset = load(name)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    for split in (dataset.train, dataset.test):
        assert set(split.labels.bincount().tolist()) == {len(split) // CLASSES[name]}
    np.testing.assert_allclose(dataset.mean, PUBLISHED[name][0], atol=6e-5)
    np.testing.assert_allclose(dataset.std, PUBLISHED[name][1], atol=6e-5)


class TestPlainDigits:
    @pytest.mark.parametrize("name", ["digits10", "digits100"])
    def test_are_grey_and_labelled(self, name):
        """White on black, with the same classes as the coloured scenes."""
        plain, drawn = (datasets.load(name, train=200, test=100, plain=plain) for plain in (True, False))
        images = plain.train.images
        assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
        assert (images == images[:, :1]).all() and images.amax((1, 2, 3)).min() > 200
        assert (images[:, :, 0] == 0).all() and (images[:, :, -1] == 0).all()
        assert torch.equal(plain.train.labels.sort()[0], drawn.train.labels.sort()[0])

    def test_mean_images_identify_their_classes(self):
        digits = datasets.load("digits10", train=2000, test=500, plain=True)
        train, test = (split.images[:, 0].flatten(1).float() for split in (digits.train, digits.test))
        means = torch.stack([train[digits.train.labels == label].mean(0) for label in range(10)])
        assert (torch.cdist(test, means).argmin(1) == digits.test.labels).float().mean() > 0.8
