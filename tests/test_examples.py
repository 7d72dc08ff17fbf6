"""The examples in the docstrings print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import urank

MODULES = [module.name for module in pkgutil.walk_packages(urank.__path__, "urank.") if "__main__" not in module.name]


@pytest.mark.parametrize("name", ["urank", *MODULES])
def test_the_examples_of_a_module_run(name):
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name), extraglobs=dict(torch=torch, nn=nn))
    assert not results.failed


def test_every_public_function_has_an_example():
    finder = doctest.DocTestFinder()
    results = {"Measurement", "LayerRank", "Probe", "Cost", "__version__"}  # what the examples of functions return
    for name in sorted(set(urank.__all__) - results):
        assert any(test.examples for test in finder.find(getattr(urank, name))), name
