"""The numbers that the papers print, as DataFrames read from `data/paper/*.csv`.

Accuracies and MLU are in percent, ratios are shares. `network` and `dataset` are this project's names; `delta` is the
printed change of accuracy.
"""

from functools import cache

import pandas as pd
import torch
from torch import nn

from urank import models
from urank.factorize import Cost, count_cost
from urank.layers import count_params
from urank.reproduction.paper_networks import PAPER as NETWORKS
from urank.reproduction.paper_networks import PARAMETER_EFFICIENT
from urank.reproduction.paths import PAPER

# Table 4's rows by the variants that this project gives its experiments; "" is a network trained from scratch.
PRETRAINING = {"ViTB16 - scratch": "", "ViTB16, FT, Lin": "linear-probe", "ViTB16, FT, E2E": "end-to-end"}
# The columns of Table 2, inferred from the recipes: the printed heads are not legible.
RECIPES = ("transformers, ImageNet", "ResNets, ImageNet", "CIFAR")
# Side in pixels of the images the paper's networks are given; 384 is that of the published end-to-end weights.
SIDES = {"cifar10": 32, "cifar100": 32, "ViTB16, FT, E2E": 384}
ENOUGH = 80.0  # percent of the input energy that suffices for the layer of Figure 1(b)


def table(name: str) -> pd.DataFrame:
    """Read data/paper/`name`.csv.

    Raises:
        FileNotFoundError: the package was installed without the repository's data folder.
    """
    path = PAPER / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the papers' numbers are in the repository's data/paper; work from a checkout")
    return pd.read_csv(path)


def table1() -> pd.DataFrame:
    """Return Table 1 (section 3.1): ViT, DeiT, Swin and ResNet on ImageNet; `baseline_top1` is printed for DeiT."""
    return named(table("table1_imagenet")).rename(columns={"original_top1_finetuned": "baseline_top1"})


def table2() -> pd.DataFrame:
    """Return Table 2 (section 5.4), one row per hyperparameter; "" where a cell is not legible."""
    printed = table("table2_hyperparameters").iloc[1:7].set_index("hyperparameter").drop(columns="notes").fillna("NA")
    printed = printed.set_axis(list(RECIPES), axis="columns")
    return printed.mask(printed.apply(lambda column: column.str.startswith("stripped")), "")


def recipe_column(network: str) -> str:
    """Return the column of Table 2 with the recipe of a network on ImageNet."""
    return RECIPES["resnet" in network]


def finetuning_epochs(network: str) -> int:
    """Return the epochs that Table 2 prints for a network on ImageNet."""
    return int(table2().loc["Epochs", recipe_column(network)])


def table3() -> pd.DataFrame:
    """Return Table 3 (section 5.5): VGG and ResNet on CIFAR-10 and CIFAR-100."""
    return named(table("table3_cifar"))


def table4() -> pd.DataFrame:
    """Return Table 4 (section 3.5): ViT-B/16 from scratch and pretrained; `variant` says how."""
    printed = named(table("table4_pretraining"))
    return printed.assign(variant=printed["model"].map(PRETRAINING))


def table5() -> pd.DataFrame:
    """Return Table 5 (section 3.4): ViT-B/16 at four tolerances in accuracy points, without the original's row."""
    printed = table("table5_epsilon")
    original = printed.iloc[0]
    rows = named(printed.iloc[1:].rename(columns={"top1": "decomposed_top1"}))
    before = dict(original_top1=original["top1"], original_mlu=original["mlu"])
    change = (rows["decomposed_top1"] - original["top1"]).round(1)
    return rows.assign(tolerance=rows["epsilon_pct"].astype(float), delta=change, **before)


def named(printed: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with this project's names of networks and data sets."""
    networks = [NETWORKS[key].name for key in zip(printed["model"], printed["dataset"])]
    named = printed.assign(network=networks, dataset=printed["dataset"].str.lower())
    return named.rename(columns={"delta_printed": "delta"})


def tradeoff(printed: pd.DataFrame) -> pd.DataFrame:
    """Return each row of `printed` before and after, as Figure 3 draws them.

    The paper prints shares. The parameters and MACs of the originals are counted on the networks that it names; its
    CIFAR ResNets are read as in Table 3's page.

    Returns:
        `network`, `dataset`, `original_params`, `original_macs`, `original_top1`, and the same of `compact_`.
    """
    rows = []
    for row in printed.to_dict("records"):
        cost = original_cost(row["network"], row["dataset"], side(row["model"], row["dataset"]))
        before = dict(original_params=cost.params, original_macs=cost.macs, original_top1=row["original_top1"])
        after = dict(
            compact_params=cost.params * row["params_ratio"],
            compact_macs=cost.macs * row["flops_ratio"],
            compact_top1=row["decomposed_top1"],
        )
        rows.append(dict(network=row["network"], dataset=row["dataset"]) | before | after)
    return pd.DataFrame(rows)


def side(model: str, dataset: str) -> int:
    """Return the side in pixels of the images of a row, by its printed name and data set."""
    return SIDES.get(model, SIDES.get(dataset, 224))


@cache
def original_cost(network: str, dataset: str, side: int) -> Cost:
    """Count parameters and MACs per image of one of the paper's networks, on images of `side` x `side` pixels."""
    return count_cost(original_network(network, dataset, side), (3, side, side))


@cache
def original_network(network: str, dataset: str, side: int) -> nn.Module:
    """Build one of the paper's networks for images of `side` x `side` pixels on the meta device: shapes, no weights."""
    classes = {"cifar10": 10, "cifar100": 100}.get(dataset, 1000)
    library = network.partition("/")[0]
    size = {"torchvision": "image_size", "timm": "img_size"}.get(library)
    options = {size: side} if size and side not in (32, 224) else {}
    with torch.device("meta"):
        return models.create(network, classes, **options)


@cache
def parameter_efficient_cost(model: str) -> tuple[Cost, int]:
    """Return the cost of a network of the second paper at 224 x 224 pixels, and its parameters without classifier."""
    with torch.device("meta"):
        network = PARAMETER_EFFICIENT[model]()
    head = network.head if hasattr(network, "head") else network.fc
    cost = count_cost(network, (3, 224, 224))
    return cost, cost.params - count_params(head)
