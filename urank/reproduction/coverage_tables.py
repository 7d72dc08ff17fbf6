"""How much of timm's architectures is measured: the last committed walk.

python -m benchmarks.timm_coverage data/benchmarks/timm_coverage.csv --forward
"""

from collections import Counter

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.style import styled
from urank.reproduction.paths import BENCHMARKS

COVERAGE = BENCHMARKS / "timm_coverage.csv"


def summarize(frame: pd.DataFrame) -> str:
    """What the whole file says, in a few lines."""
    share = frame["measured_share"]
    families = frame.groupby("family")["measured_share"].agg(["mean", "size"]).sort_values("mean")
    lines = [
        f"{len(frame)} architectures, {frame['error'].isna().sum()} came through without an error",
        f"{(share >= 0.95).sum()} with at least 95 % of the parameters in measured layers; median {share.median():.1%}",
        "least measured families:",
        *(f"  {family:<24} {mean:6.1%} of {size:.0f}" for family, mean, size in families.head(12).itertuples()),
        "most parameters left out for:",
        *(f"  {total:7.2f} networks' worth  {reason}" for reason, total in reasons(frame).most_common(8)),
    ]
    return "\n".join(lines)


def reasons(frame: pd.DataFrame) -> Counter[str]:
    """The shares of each reason in `skipped`, summed over the networks."""
    total: Counter[str] = Counter()
    for cell in frame["skipped"].dropna():
        for entry in cell.split("; "):
            reason, _, share = entry.rpartition(": ")
            total[reason] += float(share)
    return total


def families(frame: pd.DataFrame, below: float = 0.99) -> Styler:
    """The families of which less than the share `below` of the parameters is measured, the least first."""
    grouped = frame.groupby("family")["measured_share"].agg(["size", "min", "mean"]).sort_values("mean")
    shown = grouped[grouped["mean"] < below].reset_index()
    shown.columns = ["family", "architectures", "least measured", "measured on average"]
    return styled(shown, "families", dict.fromkeys(shown.columns[2:], "{:.1%}"), text=True).hide(axis="index")


def reason_table(frame: pd.DataFrame, most: int = 12) -> Styler:
    """Why parameters are left out, and how many architectures' worth of them."""
    rows = [(reason, total / len(frame)) for reason, total in reasons(frame).most_common(most)]
    shown = pd.DataFrame(rows, columns=["reason", "share of all parameters"])
    return styled(shown, "reasons", {"share of all parameters": "{:.2%}"}, text=True).hide(axis="index")


def refused(frame: pd.DataFrame) -> Styler:
    """The architectures that stopped with an error, and its message."""
    return styled(frame.loc[frame["error"].notna(), ["name", "error"]], "refused", text=True).hide(axis="index")
