"""The figure and the HTML page of a measurement."""

from base64 import b64encode
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from urank.plan import RankPlan

if TYPE_CHECKING:
    from urank.measure import Measurement

BLUE, GREY = "#0072B2", "#8a8a8a"
SEARCHED = "utilized rank, the rank of W' = P_S W P_T, which keeps the accuracy within the tolerance"
CHOSEN = "the rank that keeps most energy for the size of the network; min(d, m) where a layer stays whole"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; background: white; border-radius: 4px; }}
pre {{ white-space: pre-wrap; padding: 0.8rem; border: 1px solid #8886; border-radius: 4px; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<pre>{summary}</pre>
<img alt="Rank of W and utilized rank of every layer" src="data:image/svg+xml;base64,{figure}">
<p>Grey: rank of the weight matrix W. Blue: {meaning}. Layers are in the order of the forward pass.</p>
<h2>What to do next</h2><ul>{advice}</ul>
<h2>Layers</h2><div class="table">{table}</div>
{skipped}
</body></html>
"""


def snapshot(plan: RankPlan, title: str = "") -> Figure:
    """Draw the rank of W and the utilized rank of every layer, in the order of the forward pass (Figure 2)."""
    places = np.arange(1, len(plan.layers) + 1)
    ranks, utilized = [e.weight_rank for e in plan.layers], [e.rank for e in plan.layers]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.fill_between(places, utilized, ranks, color=BLUE, alpha=0.08, lw=0)
    axis.plot(places, ranks, "o-", color=GREY, ms=3, lw=1.2)
    axis.plot(places, utilized, "o-", color=BLUE, ms=3.5, lw=1.8)
    for place, label, color in ((0.87, "rank of W", GREY), (1.0, "utilized rank", BLUE)):
        axis.text(place, 1.03, label, color=color, ha="right", transform=axis.transAxes)
    axis.set(xlabel="layer, in forward order", ylabel="rank", ylim=(0, None), xlim=(0.5, len(places) + 0.5))
    axis.set_title(f"{title}: MLU {100 * plan.mlu:.1f} %" if title else f"MLU {100 * plan.mlu:.1f} %", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    plt.close(figure)
    return figure


def html(measured: "Measurement", title: str) -> str:
    """Return the page of a measurement: summary, snapshot, what to do next, layers, skipped modules."""
    drawing = BytesIO()
    measured.figure(title).savefig(drawing, format="svg")
    frame = measured.frame.drop(columns=["correct"])
    table = frame.to_html(index=False, border=0, formatters={"utilization": "{:.3f}".format})
    return PAGE.format(
        title=escape(title),
        summary=escape(measured.summary()),
        meaning=SEARCHED if measured.plan.probes else CHOSEN,
        figure=b64encode(drawing.getvalue()).decode(),
        advice="".join(f"<li>{escape(sentence)}</li>" for sentence in advice(measured)),
        table=table,
        skipped=skipped(measured),
    )


def skipped(measured: "Measurement") -> str:
    """Return a table of the modules that were not measured, or "" if there is none."""
    frame = measured.coverage
    frame = frame.loc[~frame["measured"], ["layer", "type", "params", "reason"]]
    if frame.empty:
        return ""
    return f'<h2>Not measured</h2><div class="table">{frame.to_html(index=False, border=0)}</div>'


def advice(measured: "Measurement") -> list[str]:
    """Return what a user may do with the result, one sentence each."""
    (before, after), speeds = measured.costs, measured.throughput
    useful = sum(entry.useful for entry in measured.plan.layers)
    sentences = [
        f"{useful} of {len(measured.plan.layers)} layers become smaller when they are split; the others stay whole.",
        "Write the compact network with --decompose or Measurement.save_compact, and fine-tune it: the accuracies "
        "above are before any fine-tuning.",
    ]
    if speeds[1] < speeds[0]:
        saved = 100 * (1 - after.params / before.params)
        sentences.append(
            f"The compact network saves {saved:.0f} % of the parameters but is slower on this device: two small layers "
            "take longer than one large layer here. Measure on your target device before you use it."
        )
    if measured.plan.probes and measured.compact_correct < measured.projected_correct:
        other = "paper" if measured.factors == "output" else "output"
        sentences.append(f"The compact network is less accurate than the projected one: try --factors {other}.")
    return sentences + [note for note in [measured.note()] if note]
