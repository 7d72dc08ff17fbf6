"""The page of discrepancies computes what `data/paper/discrepancies.csv` says, and notices where it does not."""

import nbformat
import pandas as pd
import pytest

from urank.reproduction import paper
from urank.reproduction.paths import NOTEBOOKS


def run_page() -> dict:
    """Execute the code of the page; it asserts that every recomputed value is the stored one."""
    page: dict = {}
    for cell in nbformat.read(NOTEBOOKS / "discrepancies.ipynb", 4).cells:
        if cell.cell_type == "code" and cell.id != "install":  # a cell for notebooks outside the checkout
            exec(cell.source, page)
    return page


def test_every_statement_is_recomputed_or_says_why_not():
    page = run_page()
    claims = page["claims"]
    assert claims.index.is_unique and set(claims["verdict"]) == {"contradicted", "undecided"}
    open_ones = claims[~claims.index.isin(page["recomputed"])]
    assert (open_ones["recomputed"] == "").all() and (open_ones["verdict"] == "undecided").all()
    assert (claims[["printed", "remark", "here"]] != "").all(axis=None)
    assert page["near"].sum() == 7 and len(page["near"]) == 9  # as a remark says


@pytest.mark.parametrize(
    "table, row, column, value",
    [
        ("table1_imagenet", ("DeiT-Tiny", "ImageNet-1k"), "mlu", 99),
        ("table1_imagenet", ("ViTL16", "ImageNet-1k"), "flops_ratio", 0.16),
        ("table3_cifar", ("VGG13", "CIFAR10"), "mlu", 50),
        ("table3_cifar", ("ResNet50", "CIFAR100"), "delta_printed", 1.0),
    ],
)
def test_a_table_that_said_otherwise_is_noticed(monkeypatch, table, row, column, value):
    read = paper.table

    def edited(asked: str) -> pd.DataFrame:
        content = read(asked)
        if asked == table:
            content = content.set_index(["model", "dataset"])
            content.loc[row, column] = value
        return content.reset_index() if asked == table else content

    monkeypatch.setattr(paper, "table", edited)
    with pytest.raises(AssertionError):
        run_page()
