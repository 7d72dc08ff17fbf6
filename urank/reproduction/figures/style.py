"""What all pictures and tables have in common: colours, type, the width of a cell."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

# Distinct in print, on both page themes and for readers who do not tell red from green (Okabe & Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000", "#F0E442")
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "legend.frameon": False,
}
# A wide table breaks the lines of its heads, and then scrolls by itself, so that a page stays as wide as a phone.
TABLE = [
    {"selector": "", "props": "display: block; overflow-x: auto; width: fit-content; max-width: 100%"},
    {"selector": "th, td", "props": "padding: 0.15em 0.5em; white-space: nowrap; vertical-align: top"},
    {"selector": "th.row_heading", "props": "white-space: normal"},
    {"selector": "th.col_heading", "props": "white-space: normal; vertical-align: bottom"},
]
# Of a column of words among numbers; "important", as the rule for all cells of the table is the more specific one.
WRAPPED = {"white-space": "normal !important", "min-width": "9em"}
TEXT = [{"selector": "th, td", "props": "text-align: left; white-space: normal; min-width: 6em"}]


def closed(figure: Figure) -> Figure:
    """Take the figure from pyplot's list, so that a notebook shows it where it is displayed and nowhere else."""
    plt.close(figure)
    return figure


def styled(frame: pd.DataFrame, identifier: str, formats: dict | None = None, text: bool = False) -> Styler:
    """The table as a page shows it; a missing number is a dash, and the HTML is the same each time it is drawn.

    Args:
        identifier: unique on its page.
        formats: by column.
        text: the cells hold words: left-aligned, with line breaks.
    """
    known = {name: pattern for name, pattern in (formats or {}).items() if name in frame.columns}
    styles = TABLE + (TEXT if text else [])
    return frame.style.format(known, na_rep="–").set_table_styles(styles).set_uuid(identifier)


def signed(change: float) -> str:
    """A difference of two accuracies in points, as exactly as 10,000 images tell it: "-1.05", "+0.3"."""
    return f"{change:+.2f}".removesuffix("0")


def millions(count: float) -> str:
    """A count in millions (M), from a thousand of them on in thousands of millions (G), without an exponent."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} G"
    return f"{count / 1e6:.{3 if count < 1e5 else 2 if count < 1e7 else 1}f} M"
