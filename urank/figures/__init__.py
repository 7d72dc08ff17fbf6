"""One function a figure or table, each drawn from a record's plain data."""

from urank.figures.captions import table1_caption, table3_caption, table4_caption, table5_caption
from urank.figures.contrasts import complexities, families, pretrainings, tolerances
from urank.figures.hyperparameters import paper_table2, recipes, table2_caption
from urank.figures.snapshot import snapshot, snapshot_caption
from urank.figures.spectra import cumulative, energy_sweep, spectra, spectra_caption, sweep_caption, utilization_bars
from urank.figures.style import COLORS, STYLE, styled
from urank.figures.tables import (
    comparison,
    paper_table1,
    paper_table3,
    paper_table4,
    paper_table5,
    plan_table,
    probes_table,
    provenance,
    provenances,
    style_table,
    style_table3,
    table1,
    table3,
    table4,
    table5,
)
from urank.figures.tradeoff import beside, measured_points, tradeoff, tradeoff_caption

__all__ = [
    "COLORS",
    "STYLE",
    "beside",
    "comparison",
    "complexities",
    "cumulative",
    "energy_sweep",
    "families",
    "measured_points",
    "paper_table1",
    "paper_table2",
    "paper_table3",
    "paper_table4",
    "paper_table5",
    "plan_table",
    "pretrainings",
    "probes_table",
    "provenance",
    "provenances",
    "recipes",
    "snapshot",
    "snapshot_caption",
    "spectra",
    "spectra_caption",
    "style_table",
    "style_table3",
    "styled",
    "sweep_caption",
    "table1",
    "table1_caption",
    "table2_caption",
    "table3",
    "table3_caption",
    "table4",
    "table4_caption",
    "table5",
    "table5_caption",
    "tolerances",
    "tradeoff",
    "tradeoff_caption",
    "utilization_bars",
]
