import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import finished
from matplotlib.colors import to_rgb

from urank import figures, paper
from urank.records import Record

LABELS = ["original %", "MLU of W %", "MLU %", "fine-tuned %", "change", "params", "MACs"]


@pytest.fixture(scope="module")
def record():
    return finished()[1]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def altered(record, **changes):
    """The record with other values at "outer__inner" keys."""
    content = copy.deepcopy(record.content)
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = content
        for part in outer:
            place = place[part]
        place[last] = value
    return Record(content)


def named(record, dataset, **changes):
    return altered(record, experiment__dataset=dataset, **changes)


@pytest.fixture(autouse=True)
def record_stays(record):
    before = json.dumps(record.content)
    yield
    assert json.dumps(record.content) == before


class TestSpectra:
    def test_draws_the_energy_held_by_the_first_directions(self, record):
        figure = figures.spectra(record)
        names = [entry.layer for entry in record.plan.layers]
        drawn = [names[place] for place in (0, 2, 4, 6, 8)]
        for axis, key in zip(figure.axes, ("weight", "projected"), strict=True):
            for line, name in zip(axis.get_lines(), drawn, strict=True):
                entry, values = record.plan[name], np.array(record["spectra"][name][key])
                size = min(entry.d, entry.m)
                expected = [(values[:k] ** 2).sum() / (values**2).sum() for k in range(1, size + 1)]
                np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
                np.testing.assert_allclose(line.get_xdata(), np.arange(1, size + 1) / size)
                assert line.get_ydata()[-1] == pytest.approx(1) and line.get_xdata()[-1] == 1
                assert line.get_label() == f"{names.index(name) + 1} ({name}): rank {entry.weight_rank} → {entry.rank}"

    def test_a_layer_has_one_colour_in_both_halves(self, record):
        left, right = ([line.get_color() for line in axis.get_lines()] for axis in figures.spectra(record).axes)
        assert left == right and len(set(left)) == 5

    def test_curves_stop_rising_at_the_utilized_rank(self, record):
        for line, name in zip(figures.spectra(record).axes[1].get_lines(), list(record["spectra"])[::2], strict=True):
            energy, rank = line.get_ydata(), record.plan[name].rank
            assert energy[rank - 1] >= 0.9999 * (1 - 1e-5)
            assert rank == 1 or energy[rank - 2] < 0.9999 * (1 + 1e-5)

    def test_draws_the_layers_asked_for(self, record):
        [label] = [line.get_label() for line in figures.spectra(record, ["classifier"]).axes[0].get_lines()]
        assert label.startswith("9 (classifier): rank ")

    def test_draws_all_layers_asked_for(self, record):
        """As many as VGG16 has, more than there are colours."""
        names = list(record["spectra"])
        assert len(figures.spectra(record, names + names).axes[0].get_lines()) == 2 * len(names)

    def test_of_an_unknown_layer(self, record):
        with pytest.raises(ValueError, match="features.99"):
            figures.spectra(record, ["features.99"])

    def test_caption_says_what_the_record_holds(self, record):
        text, plan = figures.spectra_caption(record), record.plan
        shares = [entry.rank / min(entry.d, entry.m) for entry in plan.layers]
        least = plan.layers[int(np.argmin(shares))]
        assert f"**{100 * np.mean(shares):.0f} %** of $W'$" in text
        assert f"({least.layer}), {least.d} x {least.m}: rank {least.weight_rank} of $W$, {least.rank} of $W'$" in text
        assert f"{record['accuracy']['projected']:.2f} % of the test images" in text


def test_spread_takes_first_and_last():
    names = [str(number) for number in range(9)]
    assert figures.spread(names, 5) == ["0", "2", "4", "6", "8"]
    assert figures.spread(names, 2) == ["0", "8"]
    assert figures.spread(names[:3], 5) == ["0", "1", "2"]


class TestEnergySweep:
    @pytest.mark.parametrize("layer", ["features.8", "classifier"])
    def test_draws_the_record_s_rows(self, record, layer):
        figure = figures.energy_sweep(record, layer)
        rows = [row for row in record["sweep"] if row["layer"] == layer]
        left, right = figure.axes
        accuracy, norm, [k_s] = *left.get_lines(), right.get_lines()
        for line in (accuracy, norm, k_s):
            assert line.get_xdata().tolist() == [row["energy"] for row in rows]
        assert accuracy.get_ydata().tolist() == [row["correct"] / record.plan.correct for row in rows]
        assert norm.get_ydata().tolist() == [row["norm_difference"] for row in rows]
        assert k_s.get_ydata().tolist() == [row["k_s"] for row in rows]
        assert layer in left.get_title()
        assert str(record.plan[layer].d) in k_s.get_label()

    def test_has_the_paper_s_colours_and_one_legend(self, record):
        figure = figures.energy_sweep(record)
        left, right = figure.axes
        (red, _, _), (_, green, _), black = (to_rgb(line.get_color()) for line in left.get_lines() + right.get_lines())
        assert red > 0.7 and green > 0.5 and black == (0, 0, 0)
        assert len(left.get_legend().get_texts()) == 3 and right.get_legend() is None

    def test_takes_the_first_layer(self, record):
        assert "features.8" in figures.energy_sweep(record).axes[0].get_title()

    def test_shows_every_point(self, record):
        rows = [row | dict(correct=2 * record.plan.correct) for row in record["sweep"]]  # a projection may help
        axis = figures.energy_sweep(altered(record, sweep=rows)).axes[0]
        assert axis.get_ylim()[1] >= 2

    @pytest.mark.parametrize("layer", ["features.0", "features.99"])
    def test_of_a_layer_that_was_not_swept(self, record, layer):
        with pytest.raises(ValueError, match=layer):
            figures.energy_sweep(record, layer)

    @pytest.mark.parametrize("layer", [None, "features.8"])
    def test_of_a_record_without_any(self, record, layer):
        with pytest.raises(ValueError, match="sweep"):
            figures.energy_sweep(altered(record, sweep=[]), layer)

    def test_caption_names_the_lowest_threshold_that_is_enough(self, record):
        correct, rows = record.plan.correct, [row for row in record["sweep"] if row["layer"] == "features.8"]
        lost = [5, 4, 2, 1, 0, *[0] * 9]  # one of 80 images is 1.25 points, the tolerance
        rows = [row | dict(correct=correct - images) for row, images in zip(rows, lost, strict=True)]
        text = figures.sweep_caption(altered(record, sweep=rows), "features.8")
        assert "at most 1.25 points keeps 60.00% of the input energy" in text
        assert f"$k_S$ = {rows[3]['k_s']} of 144 directions" in text
        assert f"{100 * rows[3]['norm_difference']:.0f} % of $\\|W\\|$" in text

    def test_caption_where_none_is_enough(self, record):
        rows = [row | dict(correct=0) for row in record["sweep"]]
        text = figures.sweep_caption(altered(record, sweep=rows), "features.8")
        assert text.startswith("No threshold") and "99.99%" in text

    def test_caption_of_a_layer_that_was_not_swept(self, record):
        for layer in ("features.0", "features.99"):
            with pytest.raises(ValueError, match=layer):
                figures.sweep_caption(record, layer)


class TestUtilizationBars:
    def test_are_the_ranks_as_shares(self, record):
        [axis] = figures.utilization_bars(record).axes
        outline, filled = axis.containers
        for bars, ranks in ((outline, "weight_rank"), (filled, "rank")):
            expected = [getattr(entry, ranks) / min(entry.d, entry.m) for entry in record.plan.layers]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
            assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(range(1, 10))
        [line] = axis.get_lines()
        assert line.get_ydata() == [record.plan.mlu] * 2
        assert f"MLU {100 * record.plan.mlu:.0f} %" in [text.get_text() for text in axis.get_legend().get_texts()]


class TestTable3:
    def test_puts_the_paper_above_what_was_measured(self, record):
        frame = figures.table3([named(record, "cifar10"), named(record, "cifar100")])
        assert frame.columns.tolist() == LABELS
        sources = [
            (dataset, "vgg11", source) for dataset in ("cifar10", "cifar100") for source in ("paper", "measured")
        ]
        assert frame.index.tolist() == sources
        printed = pd.read_csv(paper.FOLDER / "table3_cifar.csv").set_index(["model", "dataset"])
        columns = [
            "original_top1", "original_mlu", "mlu", "decomposed_top1", "delta_printed", "params_ratio", "flops_ratio"
        ]  # fmt: skip
        for dataset in ("cifar10", "cifar100"):
            expected = printed.loc[("VGG11", dataset.upper()), columns].tolist()
            assert frame.loc[(dataset, "vgg11", "paper")].tolist() == expected
        accuracy, cost, plan = record["accuracy"], record["cost"], record.plan
        assert frame.loc[("cifar10", "vgg11", "measured")].tolist() == pytest.approx(
            [
                accuracy["original"],
                100 * np.mean([entry.weight_rank / min(entry.d, entry.m) for entry in plan.layers]),
                100 * np.mean([entry.rank / min(entry.d, entry.m) for entry in plan.layers]),
                accuracy["finetuned"],
                accuracy["finetuned"] - accuracy["original"],
                cost["compact"]["params"] / cost["original"]["params"],
                cost["compact"]["macs"] / cost["original"]["macs"],
            ]
        )

    def test_of_what_the_paper_does_not_have_is_measured_only(self, record):
        assert figures.table3([record]).index.tolist() == [("digits10", "vgg11", "measured")]

    def test_of_nothing_is_empty(self):
        frame = figures.table3([])
        assert len(frame) == 0 and frame.columns.tolist() == LABELS

    def test_as_a_page_shows_it(self, record):
        shown = named(record, "cifar10", accuracy__original=91.234, accuracy__finetuned=91.0)
        html = figures.style_table3(figures.table3([shown])).to_html()
        assert html == figures.style_table3(figures.table3([shown])).to_html()  # no random identifier
        cells = [cell.split("<")[0] for cell in html.split('class="data')[1:]]
        cells = [cell.split(">")[-1] for cell in cells]
        assert cells[:7] == ["91.5", "98.0", "47.0", "92.5", "+1.0", "0.34", "0.60"]
        measured = figures.measured_row(shown)
        assert cells[7:] == [
            "91.2", f"{measured['original_mlu']:.1f}", f"{measured['mlu']:.1f}", "91.0", "-0.2",
            f"{shown.params_ratio:.2f}", f"{shown.macs_ratio:.2f}",
        ]  # fmt: skip

    def test_of_two_seeds_is_their_mean(self, record):
        seeds = [named(record, "cifar10", experiment__seed=s, accuracy__original=90.0 + s) for s in (0, 1)]
        frame = figures.table3(seeds)
        assert frame.index.get_level_values("source").tolist() == ["paper", "measured, mean of 2"]
        assert frame["original %"].tolist() == [91.5, 90.5]

    def test_of_the_paper_alone(self):
        html = figures.paper_table3().to_html()
        assert html.count("<tr>") == 1 + 1 + 14  # column names, index names, rows
        assert "+2.1" in html and "nan" not in html

    def test_caption_says_what_the_record_holds(self, record):
        text, accuracy, cost = figures.table3_caption(record), record["accuracy"], record["cost"]
        useful = sum(entry.rank * (entry.d + entry.m) < entry.d * entry.m for entry in record.plan.layers)
        assert text.startswith("**vgg11 on digits10.** Splitting all 9 layers")
        assert f"from {accuracy['original']:.2f} % to {accuracy['decomposed']:.2f} %; 2 epochs of fine-tuning" in text
        assert f"bring it to {accuracy['finetuned']:.2f} %. {useful} layers are smaller as two" in text
        assert f"{cost['compact']['params'] / 1e6:.2f} M of {cost['original']['params'] / 1e6:.2f} M parameters" in text


def test_provenance_names_the_run(record):
    values = figures.provenance(record).data.iloc[:, 0]
    assert values["network"] == "vgg11, width 0.125" and values["data set"] == "digits10" and values["seed"] == 0
    assert values["epochs"] == "4 of training, 2 of fine-tuning"
    assert values["search"] == "tolerance 1.25 points, joint, on 80 test images"
    assert values["calibration"] == "150 training images"
    assert values["date"] == record["made"]["finetune"]["date"]
    assert values["device"] == record["made"]["train"]["device"]
    assert f"torch {record['versions']['torch']}" in values["versions"] and "train " in values["seconds"]


def test_provenance_is_the_same_page_each_time(record):
    html = figures.provenance(record).to_html()
    assert html == figures.provenance(record).to_html()
    assert "150 training images" in html


def test_figures_do_not_restyle_the_reader_s(record):
    before = dict(plt.rcParams)
    figures.spectra(record)
    figures.energy_sweep(record)
    figures.utilization_bars(record)
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("draw", [figures.spectra, figures.energy_sweep, figures.utilization_bars])
def test_figures_can_be_saved(record, draw, tmp_path):
    draw(record).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
