import pandas as pd
import pytest

from urank.reproduction import discrepancies, paper
from urank.reproduction.discrepancies import CHECKS

FOUND = {function.__name__: function() for function in CHECKS}
CONTRADICTED = {
    "samples": "200,000; 20,000 are 20 of each",
    "deit_tiny": "prints 86 %; 0.99",
    "vit_l_flops": "prints 0.13",
    "strictest_tolerance": "80.9 to 81.2, +0.3 points",
    "frobenius": "the norm is 5, the sum 25",
    "weight_decay": "the 200 epochs",
    "flops_of_transformers": "3 DeiT rows",
    "reduced_by": "by 67 to 87 %",
    "small_drops": "ViTB16 loses 0.2, ViTL32 loses 0.7",
    "below_one": "SWIN-Large, ResNet34, ResNet101, ViTB16 at tolerance 0.5",
    "mlu_rise": "outside: VGG13 +21.",
    "cifar_gain": "ResNet50 on cifar100 gains 2.1",
    "close_to_100": "ViTL16 81 %, ViTL32 92 %",
    "similar_families": "47 % against 32 %; 3.14 M against 2.20 M",
    "upper_bound": "min(k_S, k_T) = 3 and rank(W') = 1",
    "cifar_resnets": "18 is neither",
}
UNDECIDED = {
    "swag": "weak supervision",
    "low_utilization": "rank-one input",
    "resolutions": "577 tokens an image against 197",
    "selection": "no other split",
    "deit_changes": "DeiT-Tiny -0.3 or +2.9, DeiT-Small +0.2 or +0.5, DeiT-Base -0.5 or -0.3",
    "second_training": "+3.2, +0.3, +0.2; 27 rows",
    "no_spread": "no row has a spread",
}


def test_every_function_of_the_module_is_checked():
    assert FOUND.keys() == CONTRADICTED.keys() | UNDECIDED.keys() and len(FOUND) == len(CHECKS)


@pytest.mark.parametrize("name", CONTRADICTED)
def test_what_the_printed_numbers_contradict(name):
    assert FOUND[name].contradicted is True
    assert CONTRADICTED[name] in FOUND[name].found


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_they_cannot_decide(name):
    assert FOUND[name].contradicted is None
    assert UNDECIDED[name] in FOUND[name].found


@pytest.mark.parametrize(
    "name, table, row, column, value",
    [
        ("deit_tiny", "table1_imagenet", ("DeiT-Tiny", "ImageNet-1k"), "mlu", 99),
        ("vit_l_flops", "table1_imagenet", ("ViTL16", "ImageNet-1k"), "flops_ratio", 0.16),
        ("mlu_rise", "table3_cifar", ("VGG13", "CIFAR10"), "mlu", 50),
        ("cifar_gain", "table3_cifar", ("ResNet50", "CIFAR100"), "delta_printed", 1.0),
    ],
)
def test_a_table_that_said_otherwise_would_agree(monkeypatch, name, table, row, column, value):
    read = paper.table

    def edited(asked: str) -> pd.DataFrame:
        content = read(asked).set_index(["model", "dataset"]) if asked == table else read(asked)
        if asked == table:
            content.loc[row, column] = value
        return content.reset_index()

    monkeypatch.setattr(paper, "table", edited)
    assert getattr(discrepancies, name)().contradicted is False


def test_summary_counts_them():
    text = discrepancies.summary(list(FOUND.values()))
    assert text.startswith(f"Of {len(FOUND)} statements, {len(CONTRADICTED)} do not hold")
    assert f"of {len(UNDECIDED)} nothing printed decides" in text
