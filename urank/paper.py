"""What the papers print, as DataFrames; the numbers are in `data/paper/*.csv`, with what was inferred marked so."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent.parent / "data" / "paper"


def table(name: str) -> pd.DataFrame:
    """The file data/paper/`name`.csv.

    Raises:
        FileNotFoundError: the package was installed without the repository's data folder.
    """
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the papers' numbers are in the repository's data/paper; work from a checkout")
    return pd.read_csv(path)


def table3() -> pd.DataFrame:
    """Table 3 (section 5.5): VGG and ResNet on CIFAR-10 and CIFAR-100.

    Accuracies in percent, mlu in percent, ratios as shares; `network` and `dataset` are this project's names.
    """
    printed = table("table3_cifar")
    names = dict(network=printed["model"].str.lower(), dataset=printed["dataset"].str.lower())
    return printed.assign(**names)
