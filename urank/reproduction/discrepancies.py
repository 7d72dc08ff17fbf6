"""Where the text of arXiv 2407.04797 and its tables disagree, each computed from the printed numbers.

A statement of the text is quoted with its section; what the tables say of it is worked out from `data/paper/*.csv`.
Where no table can decide, `found` says why the statement is doubtful instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from urank import datasets, models
from urank.reproduction import paper
from urank.reproduction.figures.recipes import left_of_a_weight
from urank.reproduction.vit_macs import Transformer, flops_column

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Discrepancy:
    """One statement of the text beside what the tables say.

    Attributes:
        title: what it is about.
        text: what the text says, and where.
        found: what follows from the printed numbers.
        here: what this project does about it.
        contradicted: True where the printed numbers, arithmetic or code contradict the statement, False where they
            agree; None where they cannot decide.
    """

    title: str
    text: str
    found: str
    here: str
    contradicted: bool | None = None

    def markdown(self) -> str:
        """A paragraph for a page."""
        return f"**{self.title}.** *The text:* {self.text} *The numbers:* {self.found} *Here:* {self.here}"


def discrepancies() -> list[Discrepancy]:
    """All of them."""
    return [function() for function in CHECKS]


def summary(found: list[Discrepancy]) -> str:
    """How many statements do not hold, in one sentence."""
    contradicted = sum(one.contradicted is True for one in found)
    undecided = sum(one.contradicted is None for one in found)
    return (
        f"Of {len(found)} statements, {contradicted} do not hold, by the printed numbers or by arithmetic and code "
        f"that anyone can check; of {undecided} nothing printed decides, and the reason to doubt them is given."
    )


def row(printed: pd.DataFrame, model: str) -> pd.Series:
    return printed.set_index("model").loc[model]


def samples() -> Discrepancy:
    """5.2 and 5.3: how many images the subspaces are computed from."""
    needed = 200 * IMAGENET_CLASSES
    return Discrepancy(
        "Samples for the subspaces",
        "200 images of each class, 20,000 in all (5.2; 5.3 repeats 20,000).",
        f"200 of each of ImageNet's {IMAGENET_CLASSES:,} classes are {needed:,}; 20,000 are "
        f"{20_000 // IMAGENET_CLASSES} of each.",
        "a record says how many images its Gram matrices were summed over.",
        needed != 20_000,
    )


def deit_tiny() -> Discrepancy:
    """3.1: the MLU of DeiT-Tiny."""
    printed = row(paper.table1(), "DeiT-Tiny")
    return Discrepancy(
        "MLU of DeiT-Tiny",
        "a true MLU of 99 % (3.1).",
        f"Table 1 prints {printed['mlu']:.0f} %; {printed['params_ratio']:.2f} are its parameters.",
        f"the table's {printed['mlu']:.0f} % is compared with.",
        bool(printed["mlu"] != 99),
    )


def vit_l_flops() -> Discrepancy:
    """3.2: the FLOPs of ViT-L/16."""
    printed = row(paper.table1(), "ViTL16")["flops_ratio"]
    return Discrepancy(
        "FLOPs of ViT-L/16",
        "16 % are left (3.2).",
        f"Table 1 prints {printed:.2f}, and the introduction says 13 %.",
        "the table's number is quoted; neither is aimed at (see the FLOPs column below).",
        bool(printed != 0.16),
    )


def strictest_tolerance() -> Discrepancy:
    """3.4: the gain at the strictest tolerance."""
    change = paper.table5().set_index("tolerance").loc[0.01]
    gain = change["delta_printed"]
    return Discrepancy(
        "Gain at tolerance 0.01",
        "+0.4 points (3.4).",
        f"Table 5: {change['original_top1']} to {change['decomposed_top1']}, {gain:+.1f} points.",
        "changes are computed from the accuracies in one row.",
        bool(gain != 0.4),
    )


def frobenius() -> Discrepancy:
    """2.2: what the Frobenius norm is."""
    W = torch.diag(torch.tensor([3.0, 4.0]))
    norm, squares = torch.linalg.matrix_norm(W).item(), torch.linalg.svdvals(W).square().sum().item()
    return Discrepancy(
        "The Frobenius norm",
        "it is the sum of the squared singular values (2.2).",
        f"that is its square, as 5.1 has it: for singular values 3 and 4 the norm is {norm:g}, the sum {squares:g}.",
        "energies are sums of squares, norms their roots.",
        norm != squares,
    )


def swag() -> Discrepancy:
    """Abstract, 1, 3.5, 5.6: what kind of pretraining SWAG is."""
    return Discrepancy(
        "SWAG",
        "self-supervised (abstract, 1, 3.5, 5.6), and weakly supervised (3.5).",
        "no table decides; the reference that the paper gives for it trains on hashtags, which is weak supervision.",
        "called pretrained.",
    )


def weight_decay() -> Discrepancy:
    """Table 2: the weight decay of the CIFAR networks."""
    cell, left = paper.table2().iloc[:, 2]["Weight Decay"], left_of_a_weight()
    return Discrepancy(
        "Weight decay for CIFAR",
        f"Table 2 prints {cell}.",
        f"the smallest, at the smallest learning rate of the column, leaves {100 * left:.1f} % of a weight after 100 "
        "steps; as epochs at which the learning rate drops, the three fit "
        f"the {paper.table2().iloc[:, 2]['Epochs']} epochs of the same column.",
        "0.0005 for VGG, 0.0002 for ResNet, and a one-cycle schedule.",
        left < 0.01,
    )


def flops_of_transformers() -> Discrepancy:
    """Tables 1, 4, 5: the FLOPs column of torchvision's vision transformers."""
    column = flops_column()
    torchvision = column[column["library"] == "torchvision"]
    gaps = (torchvision["implied"] - torchvision["printed"]).abs()
    near = (torchvision["hidden"].round(2) - torchvision["printed"]).abs().round(2) <= 0.03  # as the page shows them
    timm = column[column["library"] == "timm"]
    return Discrepancy(
        "FLOPs of torchvision's transformers",
        "the FLOPs columns of Tables 1, 4 and 5.",
        f"if every matrix of a transformer shrinks by one factor, its share of multiplications follows its share of "
        f"parameters. For the {len(timm)} DeiT rows it does, to {(timm['implied'] - timm['printed']).abs().max():.2f}; "
        f"for the {len(torchvision)} torchvision rows it is off by {gaps.min():.2f} to {gaps.max():.2f}. Leaving QKV "
        f"and attention out of the factored network's count gives the printed number to 0.03 in "
        f"{near.sum()} of {len(torchvision)} rows.",
        "MACs are counted with attention in sight and checked against the closed form; the printed column is not aimed "
        "at.",
        bool((gaps > 0.05).any()),
    )


def reduced_by() -> Discrepancy:
    """1: whether 13 to 33 % of the FLOPs are saved or left."""
    left = paper.table1().set_index("model").loc[["ViTB16", "ViTB32", "ViTL16", "ViTL32"], "flops_ratio"]
    return Discrepancy(
        "FLOPs reduced by 13 to 33 %",
        "FLOPs of the ViTs are reduced by between 13 and 33 % (1).",
        f"Table 1 prints {left.min():.2f} to {left.max():.2f} as what is left, a reduction by "
        f"{100 * (1 - left.max()):.0f} to {100 * (1 - left.min()):.0f} %.",
        "every share is of what is left, and says so.",
        not left.between(0.67, 0.87).all(),
    )


def small_drops() -> Discrepancy:
    """Abstract, 1: the accuracy that the ViTs lose."""
    vits = paper.table1()[lambda table: table["model"].str.startswith("ViT")].set_index("model")
    inside = vits[vits["mlu"].between(20, 35)]["delta_printed"]
    more = inside[inside <= -0.2]
    return Discrepancy(
        "Less than 0.2 % lost",
        "less than 0.2 points for ViTs whose MLU is 20 to 35 % (abstract, 1).",
        f"of the {len(inside)} rows in that range "
        f"{', '.join(f'{name} loses {-drop:.1f}' for name, drop in more.items())}.",
        "the change of every row is shown, with its spread where there are several seeds.",
        len(more) > 0,
    )


def below_one() -> Discrepancy:
    """Whether ImageNet networks lose less than 1 %."""
    table1, table5 = paper.table1().set_index("model"), paper.table5().set_index("tolerance")
    lost = [*table1.index[table1["delta_printed"] <= -1.0]]
    lost += [f"ViTB16 at tolerance {t:g}" for t in table5.index[table5["delta_printed"] <= -1.0]]
    return Discrepancy(
        "Less than 1 % lost",
        "less than 1 point on ImageNet (3.2), also at tolerance 0.5 (3.4).",
        f"exactly 1.0 is printed for {', '.join(lost)}.",
        "nothing is claimed at a threshold; margins are on the status page.",
        len(lost) > 0,
    )


def mlu_rise() -> Discrepancy:
    """How much the MLU rises from CIFAR-10 to CIFAR-100."""
    mlu = paper.table3().pivot(index="model", columns="dataset", values="mlu")
    rise = mlu["cifar100"] - mlu["cifar10"]
    outside = rise[~rise.between(10, 20)]
    return Discrepancy(
        "MLU from CIFAR-10 to CIFAR-100",
        "it rises by 10 to 20 points (3.3).",
        f"outside: {', '.join(f'{model} {points:+.0f}' for model, points in outside.items())}.",
        "Figure 2's centre panel states the rise that was measured.",
        len(outside) > 0,
    )


def cifar_gain() -> Discrepancy:
    """How much accuracy CIFAR networks gain."""
    table3 = paper.table3()
    best = table3.loc[table3["delta_printed"].idxmax()]
    return Discrepancy(
        "Gains on CIFAR",
        "up to 2 points (3.2).",
        f"{best['model']} on {best['dataset']} gains {best['delta_printed']:.1f}.",
        "the gain is set beside that of the full-rank network after the same fine-tuning, where it was run.",
        bool(best["delta_printed"] > 2),
    )


def close_to_100() -> Discrepancy:
    """Whether original networks look fully used."""
    low = paper.table1().set_index("model")["original_mlu"].loc[lambda mlu: mlu < 95]
    return Discrepancy(
        "Original models look full rank",
        "the MLU of unaltered weights is close to a number that is not legible, 100 in the context (3.1).",
        f"{', '.join(f'{model} {mlu:.0f} %' for model, mlu in low.items())}.",
        "the rank of W is shown beside that of W' in Figures 1 and 2 and in every table of measured rows.",
        len(low) > 0,
    )


def similar_families() -> Discrepancy:
    """3.1: whether VGG11 and VGG19 come out alike."""
    table3 = paper.table3().query("dataset == 'cifar10'").set_index("model")
    mlu, size = table3["mlu"], table3["params_decomposed_M_inferred"]
    return Discrepancy(
        "VGG11 and VGG19 utilize alike",
        "similar utilization (3.1), sizes stable around 2.5 M.",
        f"MLU {mlu['VGG11']} % against {mlu['VGG19']} %; {size['VGG11']:.2f} M against {size['VGG19']:.2f} M.",
        "Figure 2's left panel draws ranks, not shares; similar ranks in layers of one width may be meant.",
        bool(mlu["VGG11"] - mlu["VGG19"] > 10),
    )


def low_utilization() -> Discrepancy:
    """What a utilization near zero means."""
    return Discrepancy(
        "Utilization near zero",
        "the data are then orthogonal to the weights (2.3).",
        "inputs of few dimensions give the same value without any orthogonality: a rank-one input bounds the rank of "
        "W' by one, whatever W is.",
        "a record keeps the spectrum of X beside that of W', which tells inputs of few dimensions from inputs that W "
        "ignores; k_S does not.",
    )


def resolutions() -> Discrepancy:
    """Table 4: whether its rows are comparable."""
    scratch, end_to_end = (Transformer(side, 16, 768, 12) for side in (224, paper.SIDES["ViTB16, FT, E2E"]))
    linear = row(paper.table4(), "ViTB16, FT, Lin")
    return Discrepancy(
        "Three ways to train ViT-B/16",
        "one architecture compared in Table 4 (3.5).",
        f"the published end-to-end weights are for {end_to_end.side} pixels, {end_to_end.tokens} tokens an image "
        f"against {scratch.tokens}; and the linear probe's {linear['decomposed_top1']} % after fine-tuning the whole "
        f"network stands beside {linear['original_top1']} % of a frozen one, which the paper itself calls unfair.",
        "one size of images for all three rows, but in the profile imagenet, which takes the published weights as they "
        "are.",
    )


def selection() -> Discrepancy:
    """On which images ranks are chosen and accuracies reported."""
    return Discrepancy(
        "Selected on the reported set",
        "the search consults validation accuracy, and validation accuracy is reported.",
        "no other split is mentioned; for CIFAR it would be the test set.",
        "a record says which images its search consulted.",
    )


def second_training() -> Discrepancy:
    """5.4: how long the fine-tuning is, and what it is compared with."""
    deit = paper.table1().dropna(subset="original_top1_finetuned").set_index("model")
    moved = (deit["original_top1_finetuned"] - deit["original_top1"]).round(1)
    epochs = ", ".join(paper.table2().loc["Epochs"])
    others = len(paper.table1()) + len(paper.table3()) - len(deit)
    return Discrepancy(
        "Fine-tuning or a second training",
        'accuracy gained on CIFAR is attributed, "potentially", to regularization (3.2).',
        f"fine-tuning takes {epochs} epochs, about as long as the recipes of torchvision and of the cited repository "
        f"train from scratch. A full-rank network with the same budget is printed for DeiT alone, where it "
        f"moved the original by {', '.join(f'{points:+.1f}' for points in moved)}; "
        f"{others} rows of Tables 1 and 3 have none.",
        "a record holds the accuracy of the full-rank network after the same fine-tuning where that was run.",
    )


def deit_changes() -> Discrepancy:
    """Table 1: what DeiT's changes are relative to."""
    deit = paper.table1().dropna(subset="original_top1_finetuned").set_index("model")
    against = (deit["decomposed_top1"] - deit["original_top1"]).round(1)
    parts = [f"{model} {deit.loc[model, 'delta_printed']:+.1f} or {against[model]:+.1f}" for model in deit.index]
    return Discrepancy(
        "Changes of DeiT",
        "changes against the original fine-tuned as long, for DeiT alone; both originals are printed (3.1).",
        f"DeiT's are against the fine-tuned original, the others' against the published one: {', '.join(parts)}.",
        "both originals are shown, and the status page compares changes against the one that was split.",
    )


def upper_bound() -> Discrepancy:
    """2.3: whether the utilized rank is min(k_S, k_T)."""
    W = torch.outer(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    rank = int(torch.linalg.matrix_rank(W))
    return Discrepancy(
        "The rank of W'",
        "r = min(k_S, k_T), by a public summary; the formula of 2.3 is not legible.",
        f"that is an upper bound: with nothing projected away a 3 x 3 matrix of rank {rank} has min(k_S, k_T) = 3 and "
        f"rank(W') = {rank}.",
        "rank(W') is computed, and k_S and k_T are given beside it.",
        rank != 3,
    )


def no_spread() -> Discrepancy:
    """Differences without a spread."""
    changes = pd.concat([paper.table1()["delta_printed"], paper.table3()["delta_printed"]])
    small = changes.abs() <= 0.35
    return Discrepancy(
        "No repeats",
        "differences of 0.1 to 0.3 points are interpreted.",
        f"{small.sum()} of {len(changes)} changes in Tables 1 and 3 are of 0.3 points or less; no row has a spread.",
        "the mean and the spread over seeds, where a measurement was repeated.",
    )


def cifar_resnets() -> Discrepancy:
    """A footnote: the repository of the CIFAR networks."""
    basic, bottleneck = (18 - 2) % 6 == 0, (18 - 2) % 9 == 0
    with torch.device("meta"):
        network = models.create("resnet18", datasets.CLASSES["cifar10"])
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return Discrepancy(
        "ResNet18 on CIFAR",
        "networks of a public repository (footnote).",
        "there a depth is 6 n + 2 with basic blocks or 9 n + 2 with bottlenecks; 18 is neither.",
        f"read as n = 3, {size:.2f} M parameters, which fits the printed accuracy.",
        not (basic or bottleneck),
    )


CHECKS: tuple[Callable[[], Discrepancy], ...] = (
    samples,
    deit_tiny,
    vit_l_flops,
    strictest_tolerance,
    frobenius,
    swag,
    weight_decay,
    flops_of_transformers,
    reduced_by,
    small_drops,
    below_one,
    mlu_rise,
    cifar_gain,
    close_to_100,
    similar_families,
    low_utilization,
    resolutions,
    selection,
    second_training,
    deit_changes,
    upper_bound,
    no_spread,
    cifar_resnets,
)
