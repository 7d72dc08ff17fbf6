"""Tables and a figure of the committed benchmark results (`make bench`)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from urank.files import read_json
from urank.reproduction.figures.style import COLORS, STYLE, WRAPPED, closed, styled
from urank.reproduction.paths import BENCHMARKS

BENCHMARK = BENCHMARKS / "speed.json"
RATIOS = {
    "what": "what",
    "ratio": "times faster",
    "processor_ratio": "times less CPU time",
    "same": "same result",
    "naive_seconds": "naive, s",
    "seconds": "this package, s",
    "naive_peak_mib": "naive, MiB",
    "peak_mib": "this package, MiB",
}
SEARCH = {name: label for name, label in RATIOS.items() if name != "processor_ratio"}
SEARCH |= {name: name for name in ("images", "correct", "probes", "failed")}
PRETRAINED = {
    "what": "network",
    "images": "images",
    "layers": "layers",
    "probes": "probes",
    "pass_seconds": "one naive pass, s",
    "naive_seconds": "naive, all probes, s",
    "seconds": RATIOS["seconds"],
    "ratio": RATIOS["ratio"],
    "compared": "layers searched both ways",
    "same": RATIOS["same"],
}
DELVE = {name: label for name, label in RATIOS.items() if name != "same"}
DELVE |= {"naive_seconds": "delve, s", "naive_peak_mib": "delve, MiB"}
APPROXIMATION = RATIOS | {
    "naive_seconds": "exact, s",
    "seconds": "approximate, s",
    "naive_peak_mib": "exact, MiB",
    "peak_mib": "approximate, MiB",
    "mlu_exact": "MLU exact %",
    "mlu": "MLU %",
    "largest_rank_difference": "largest change of a rank",
}
MEMORY = {
    "what": "what",
    "given_back": "given back, images/s",
    "kept": "kept, images/s",
    "ratio": RATIOS["ratio"],
}
TRAINING = {
    "what": "network",
    "device": "device",
    "batch": "images a batch",
    "float32": "float32, images/s",
    "bfloat16": "bfloat16, images/s",
    "captured": "bfloat16 captured, images/s",
    "ratio": "times faster",
    "auto": "auto",
}
WHOLE = {
    "what": "what",
    "device": "device",
    "images": "images",
    "probes": "probes",
    "failed": "failed",
    "seconds": "seconds",
    "grams_seconds": "Gram matrices, s",
    "peak_mib": "memory, MiB",
    "images_per_second": "images/s",
    "tflops": "TFLOP/s",
    "device_tflops": "of the device",
    "hours_for_50000": "hours for 50,000 images",
    "paper_gpu_hours": "the paper's GPU hours",
}


def benchmark(path: Path = BENCHMARK) -> pd.DataFrame:
    """Return the rows that `benchmarks/speed.py` wrote."""
    return pd.DataFrame(read_json(path)["rows"])


def machines(rows: pd.DataFrame) -> str:
    """Return a sentence that names the devices and torch versions of the rows, with the parts if there are several."""
    groups = rows.groupby(["device", "torch"], sort=False)["only"].unique()
    where = [f"{device}, torch {torch}" for device, torch in groups.index]
    if len(where) > 1:
        where = [f"{one} ({', '.join(parts)})" for one, parts in zip(where, groups)]
    return f"Measured on {'; '.join(where)}."


def table(rows: pd.DataFrame, part: str, columns: dict[str, str] = RATIOS) -> Styler:
    """Return one part of the benchmark as a table, one row per comparison.

    Args:
        columns: heading on the page for each column of `rows`; columns without a value are left out.
    """
    chosen = rows[rows["part"] == part].reindex(columns=list(columns)).rename(columns=columns)
    chosen = chosen.dropna(axis=1, how="all") if len(chosen) else chosen
    numbers = chosen.select_dtypes("number").columns
    formats = {name: "{:.1f}" if (chosen[name] % 1).any() else "{:.0f}" for name in numbers}
    formats |= {RATIOS[name]: "{:.2f}" for name in ("ratio", "processor_ratio")}
    shown = styled(chosen, part.split()[0], formats).hide(axis="index")
    return shown.set_properties(subset=[columns["what"]], **WRAPPED)


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Return the slope of log y over log x: y grows as x to this power."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def series(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the scaling rows in three groups, in which only the number of images, the width or the depth differs."""
    scaling = rows[rows["part"] == "scaling"]
    base = scaling.iloc[0]
    same = {name: scaling[name] == base[name] for name in ("network", "width", "images")}
    return {
        "images": scaling[same["network"] & same["width"]].sort_values("images"),
        "width": scaling[same["network"] & same["images"]].sort_values("width"),
        "layers": scaling[same["width"] & same["images"]].sort_values("layers"),
    }


def scaling(rows: pd.DataFrame) -> Figure:
    """Draw CPU seconds and memory of the exact search over images, width and layers, with the fitted powers.

    Memory is left out if the system does not report it.
    """
    told = (rows.loc[rows["part"] == "scaling", "peak_mib"] > 0).all()
    measures = {"processor": "CPU seconds"} | ({"peak_mib": "memory added, MiB"} if told else {})
    size = (9, 2.8 * len(measures))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(measures), 3, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for column, (name, frame) in zip(axes.T, series(rows).items()):
        for axis, measure in zip(column, measures):
            power = exponent(frame[name], frame[measure])
            axis.plot(frame[name], frame[measure], "o-", color=COLORS[0])
            axis.set(xscale="log", yscale="log", title=f"grows as {name}$^{{{power:.1f}}}$")
            axis.set_xticks(frame[name], [f"{value:g}" for value in frame[name]])
            for point in zip(frame[name], frame[measure]):
                axis.annotate(f"{point[1]:.3g}", point, (-8, 6), textcoords="offset points", ha="center")
            axis.margins(0.12, 0.2)
            axis.minorticks_off()
            axis.set_yticks([])
        column[-1].set_xlabel(name)
    for axis, label in zip(axes[:, 0], measures.values()):
        axis.set_ylabel(label)
    return closed(figure)
