"""Figures and tables of the book, each drawn from records."""

# ruff: noqa: F401
from urank.reproduction.figures.choices import over_choice, parts, ranks_by_part, utilization_by_part
from urank.reproduction.figures.deviation import deviation
from urank.reproduction.figures.groups import (
    base_records,
    differing_in_dataset,
    differing_in_finetuning,
    differing_in_search,
    differing_in_seed,
    differing_in_size,
    differing_in_tolerance,
    differing_in_training,
    differing_in_weights,
    figure2_panels,
    in_no_panel,
    without_variants,
)
from urank.reproduction.figures.recipes import (
    numbers,
    prepared_recipes,
    printed_table2,
    recipe_fields,
    shared_fields,
)
from urank.reproduction.figures.runs import plan_table, probes_table, run_details, run_table
from urank.reproduction.figures.snapshot import peak_table, snapshot
from urank.reproduction.figures.spectra import (
    cumulative,
    energy_sweep,
    evenly_spaced,
    spectra,
    spectra_table,
    sweep_table,
)
from urank.reproduction.figures.style import EXACT, caption, heading, network_color, notebook_style, spelled, styled
from urank.reproduction.figures.tables import measured_row, measured_table, printed_table
from urank.reproduction.figures.tradeoff import by_dataset, change_table, measured_points, printed_for, tradeoff
from urank.reproduction.figures.variations import (
    faster_counts,
    recipe_table,
    search_table,
    seed_table,
    size_table,
    speed_table,
    throughput_table,
)
