"""What the search protocol decides: one network, searched in several ways."""

from collections.abc import Sequence

import pandas as pd
from pandas.io.formats.style import Styler

from urank.reproduction.figures.selection import protocol
from urank.reproduction.figures.style import styled
from urank.reproduction.figures.tables import printed_row
from urank.reproduction.record import Record

FORMATS = {
    "MLU %": "{:.1f}",
    "moved by at most": "{:.1f}",
    "params": "{:.2f}",
    "lost, consulted": "{:.2f}",
    "lost, test": "{:.2f}",
}


def protocol_table(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each way to search one network; the first record's is what the others are compared with.

    Returns:
        `MLU %`; `moved by at most`, the largest change of a layer's utilization against the first record, in points;
        `params` as a share of the original's; `lost, consulted` and `lost, test`, the accuracy points that all
        projections together cost on the images that the search consulted (nan where each layer was searched by itself:
        nobody counted them with all in place) and on the test images.
    """
    ways = [protocol(record, records) for record in records]
    return pd.DataFrame([protocol_row(record, records[0]) for record in records], index=pd.Index(ways, name="search"))


def protocol_row(record: Record, reference: Record) -> dict:
    accuracy = record["accuracy"]
    pairs = zip(record.plan.layers, reference.plan.layers, strict=True)
    return {
        "MLU %": 100 * record.plan.mlu,
        "moved by at most": 100 * max(abs(one.utilization - other.utilization) for one, other in pairs),
        "params": record.params_ratio,
        "lost, consulted": lost_where_consulted(record),
        "lost, test": accuracy["original"] - accuracy["projected"],
    }


def lost_where_consulted(record: Record) -> float:
    """Accuracy points between the original network and all projections, on the images that the search counted."""
    plan, backward = record.plan, record["experiment"].get("order") == "backward"
    if plan.mode == "isolated":
        return float("nan")
    last = plan.layers[0 if backward else -1]
    return 100 * (plan.correct - last.correct) / plan.total


def style_protocol(frame: pd.DataFrame, identifier: str) -> Styler:
    """A table of this module as a page shows it."""
    return styled(frame, identifier, FORMATS)


def protocol_caption(records: Sequence[Record]) -> str:
    """What the table says, in one paragraph of Markdown."""
    frame, experiment = protocol_table(records), records[0]["experiment"]
    lowest, highest = frame["MLU %"].idxmin(), frame["MLU %"].idxmax()
    worst = frame["lost, test"].idxmax()
    layers, tolerance = len(records[0].plan.layers), records[0].plan.tolerance
    network = f"**{experiment['network']} on {experiment['dataset']}{left_out(records)}.**"
    moved = frame["moved by at most"]
    return (
        f"{network} The MLU lies between {frame['MLU %'].min():.1f} % (*{lowest}*) and {frame['MLU %'].max():.1f} % "
        f"(*{highest}*); a single layer's utilization moves by up to {moved.max():.1f} points (*{moved.idxmax()}*). "
        f"All projections together cost up to {frame['lost, test'].max():.2f} points of accuracy on the test images "
        f"(*{worst}*). With {layers} layers and a tolerance of {tolerance:g} a joint search may lose up to "
        f"{2 * layers * tolerance:g} points on the images that it consults.{nearest_to_paper(records, frame)}"
    )


def left_out(records: Sequence[Record]) -> str:
    """Words for the training of a network that did not see the images it was to be searched on; "" for others."""
    held_out = [record for record in records if record["experiment"]["holdout"]]
    if not held_out:
        return ""
    experiment, accuracy = held_out[0]["experiment"], held_out[0]["accuracy"]["original"]
    return (
        f", trained for {experiment['train']['epochs']} epochs without the last {experiment['holdout']:,} training "
        f"images (accuracy on the test images {accuracy:.2f} %)"
    )


def nearest_to_paper(records: Sequence[Record], frame: pd.DataFrame) -> str:
    """Which search comes nearest to the MLU that the paper prints for this network.

    "" where it prints none, and for a network that saw fewer training images than the paper's.
    """
    printed = printed_row(records[0])
    if printed is None or left_out(records):
        return ""
    nearest = (frame["MLU %"] - printed["mlu"]).abs().idxmin()
    return (
        f" The paper prints an MLU of {printed['mlu']:.0f} % and params x {printed['params_ratio']:.2f}; the nearest "
        f"MLU is {frame['MLU %'][nearest]:.1f} % (*{nearest}*)."
    )
