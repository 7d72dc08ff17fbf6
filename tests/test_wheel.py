"""A wheel in an environment that has its declared dependencies and nothing else."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

MEASURE = """
import torch, urank

model = urank.create("resnet18", classes=4, width=0.25).eval()
images = torch.randn(8, 3, 32, 32)
batches = [(images, model(images).argmax(1))]
layers = list(urank.matrix_layers(model))[:3]
grams = urank.accumulate_grams(model, batches, layers, progress=False)
plan = urank.search_ranks(model, grams, batches, tolerance=50, progress=False)
assert [entry.layer for entry in plan.layers] == layers and len(plan.to_frame()) == 3
compact = urank.decompose(urank.project_network(model, plan, grams), plan).eval()
urank.save_compact(compact, plan, "compact")
loaded = urank.load_compact(model, "compact").eval()
assert torch.equal(loaded(images), compact(images)) and not torch.equal(compact(images), model(images))
assert urank.create("timm/test_resnet", classes=4)(images).shape == (8, 4)
print(urank.__file__)
"""


def run(*command, cwd, **variables):
    """The output of a command, which must succeed and cannot see this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder):
    """Build a wheel from a copy of the sources, since setuptools keeps deleted modules in a folder `build`."""
    shutil.copytree(ROOT / "urank", folder / "urank", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def requirements_of(distribution, extras=()):
    """The requirements of an installed distribution on this machine, with some of its extras."""
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def link_requirements(distribution, site, extras=(), linked=None):
    """Link what `distribution` requires, directly or indirectly, from this environment into another's `site`."""
    linked = set() if linked is None else linked
    for requirement in requirements_of(distribution, extras):
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in linked:
            linked.add(key)
            required = importlib.metadata.distribution(requirement.name)
            link_files(required, site)
            link_requirements(required, site, requirement.extras, linked)


def link_files(distribution, site):
    """Link the packages and modules of an installed distribution, and its metadata."""
    for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(distribution.locate_file(name))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder of an environment with the wheel of this checkout and its dependencies, without extras."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    (folder / "source").mkdir()
    wheel = build_wheel(folder / "source")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    [installed] = importlib.metadata.distributions(name="urank", path=[str(site)])
    link_requirements(installed, site)
    assert "No broken requirements" in run(*pip, "check", cwd=folder)
    return folder


@pytest.fixture
def without_urank(tmp_path):
    """The Python of an environment that has what the notebooks need, but not the package."""
    venv.create(tmp_path / "environment")
    [site] = (tmp_path / "environment").glob("lib/python*/site-packages")
    link_requirements(importlib.metadata.distribution("urank"), site, ["reproduction"])
    for name in ("pip", "setuptools"):
        link_files(importlib.metadata.distribution(name), site)
    return tmp_path / "environment" / "bin" / "python"


@pytest.mark.slow
def test_a_downloaded_notebook_installs_the_package_and_fetches_the_records(without_urank, tmp_path):
    """One file in an empty folder; a repository of this working tree is in GitHub's place."""
    repository, folder = tmp_path / "repository", tmp_path / "folder"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "table2_hyperparameters.ipynb", folder)
    run("git", "init", "--quiet", "--bare", repository, cwd=tmp_path)
    git = ["git", f"--git-dir={repository}", "-c", "core.bare=false", f"--work-tree={ROOT}"]
    run(*git, "add", "--all", cwd=ROOT)
    run(*git, "-c", "user.name=test", "-c", "user.email=", "commit", "--quiet", "--message=all", cwd=ROOT)
    run(
        *(without_urank, "-m", "papermill", "table2_hyperparameters.ipynb", "executed.ipynb", "-p", "profile", "smoke"),
        cwd=folder,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.file://{repository}.insteadOf",
        GIT_CONFIG_VALUE_0="https://github.com/urank/urank",
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="false",  # pip's name for: do not build in isolation
    )
    executed = (folder / "executed.ipynb").read_text()
    assert "cifar10/vgg11" in executed and (folder / "urank-book" / "data" / "records").exists()


@pytest.mark.slow
def test_measures_and_splits_a_network(environment, tmp_path):
    output = run(environment / "bin" / "python", "-c", MEASURE, cwd=tmp_path)
    assert Path(output.strip()).is_relative_to(environment)


@pytest.mark.slow
def test_has_its_command(environment, tmp_path):
    assert "Usage" in run(environment / "bin" / "urank", "measure", "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sklearn", "snakemake", "pytest", "sphinx"])
def test_needs_no_extra(environment, tmp_path, module):
    """What an extra installs is not there, so the tests above show that it is not needed."""
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run(environment / "bin" / "python", "-c", f"import {module}", cwd=tmp_path)
