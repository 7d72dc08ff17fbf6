"""How much of timm's architectures can be measured: tables of the last committed walk.

python -m benchmarks.timm_coverage data/benchmarks/timm_coverage.csv --forward
"""

from collections import Counter

import pandas as pd

from urank.reproduction.paths import BENCHMARKS

COVERAGE = BENCHMARKS / "timm_coverage.csv"
WELL = 0.95  # share of the parameters in measured layers


def totals(frame: pd.DataFrame) -> pd.Series:
    """Return how many architectures were walked through, and how much of them is measured."""
    share = frame["measured_share"]
    return pd.Series(
        {
            "architectures": len(frame),
            "without an error": frame["error"].isna().sum(),
            f"at least {WELL:.0%} measured": (share >= WELL).sum(),
            "median measured": f"{share.median():.1%}",
        }
    )


def summarize(frame: pd.DataFrame) -> str:
    """Return the tables of this module as text."""
    tables = (totals(frame), families(frame, below=1).head(12), reasons(frame).head(8))
    return "\n\n".join(table.to_string() for table in tables)


def families(frame: pd.DataFrame, below: float = 0.99) -> pd.DataFrame:
    """Return the families of which on average less than the share `below` is measured, the least first."""
    grouped = frame.groupby("family")["measured_share"].agg(["size", "min", "mean"]).sort_values("mean")
    shown = grouped[grouped["mean"] < below]
    return shown.set_axis(["architectures", "least measured", "measured on average"], axis="columns")


def reasons(frame: pd.DataFrame) -> pd.DataFrame:
    """Return why parameters are not measured, with their share averaged over the architectures, the largest first."""
    total: Counter[str] = Counter()
    for cell in frame["skipped"].dropna():
        for entry in cell.split("; "):
            reason, _, share = entry.rpartition(": ")
            total[reason] += float(share) / len(frame)
    return pd.DataFrame(total.most_common(), columns=["reason", "share of all parameters"]).set_index("reason")


def refused(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the architectures that stopped with an error, and its message."""
    return frame.loc[frame["error"].notna(), ["name", "error"]].set_index("name")
