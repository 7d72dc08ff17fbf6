import copy
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import finished
from matplotlib.colors import to_rgb

from urank.reproduction import figures, paper
from urank.reproduction.figures.selection import place
from urank.reproduction.figures.style import signed
from urank.reproduction.record import Record

LABELS = ["original %", "MLU of W %", "MLU %", "fine-tuned %", "change", "params", "MACs"]


@pytest.fixture(scope="module")
def record():
    """Without a full-rank baseline; tests that look at one add it."""
    return altered(finished()[1], accuracy__baseline=None)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("change", "text"), [(65.58 - 66.63, "-1.05"), (0.3, "+0.3"), (1.0, "+1.0"), (-10.0, "-10.0"), (0.0, "+0.0")]
)
def test_a_change_of_accuracy_keeps_its_second_decimal(change, text):
    assert signed(change) == text


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
                expected = [(values[:k] ** 2).sum() / (values**2).sum() for k in range(size + 1)]
                np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
                np.testing.assert_allclose(line.get_xdata(), np.arange(size + 1) / size)
                assert line.get_ydata()[-1] == pytest.approx(1) and line.get_xdata()[-1] == 1
                assert line.get_label() == f"{names.index(name) + 1} ({name}): rank {entry.weight_rank} → {entry.rank}"

    def test_a_layer_has_one_colour_in_both_halves(self, record):
        left, right = ([line.get_color() for line in axis.get_lines()] for axis in figures.spectra(record).axes)
        assert left == right and len(set(left)) == 5

    def test_curves_stop_rising_at_the_utilized_rank(self, record):
        for line, name in zip(figures.spectra(record).axes[1].get_lines(), list(record["spectra"])[::2], strict=True):
            energy, rank = line.get_ydata(), record.plan[name].rank
            assert energy[rank] >= 0.9999 * (1 - 1e-5)
            assert rank == 1 or energy[rank - 1] < 0.9999 * (1 + 1e-5)

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
        first, *others = plan.to_dict()["layers"]
        text = figures.spectra_caption(altered(record, plan__layers=[first | dict(rank=0), *others]))
        assert (
            f"In {sum(layer['rank'] == layer['k_t'] for layer in others)} of 9 layers the rank of $W'$ is $k_T$" in text
        )


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
        [legend] = figure.legends
        assert len(legend.get_texts()) == 3 and left.get_legend() is right.get_legend() is None

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
        assert "at most 1.25 points is 60 % of the input energy" in text
        assert f"$k_S$ = {rows[3]['k_s']} of 144 directions" in text
        assert f"{100 * rows[3]['norm_difference']:.0f} % of $\\|W\\|$" in text
        assert rows[5]["energy"] == 0.8 and "At 80 %, enough for the paper's layer, 100.0 % of the accuracy" in text
        assert f"{100 * rows[3]['correct'] / correct:.1f} % of the accuracy kept." in text
        assert "At 80 %" not in figures.sweep_caption(altered(record, sweep=rows[6:]), "features.8")
        from_80 = figures.sweep_caption(altered(record, sweep=rows[5:]), "features.8")
        assert from_80.endswith("The same was enough for the paper's layer.") and "At 80 %" not in from_80

    def test_caption_where_none_is_enough(self, record):
        rows = [row | dict(correct=0) for row in record["sweep"]]
        text = figures.sweep_caption(altered(record, sweep=rows), "features.8")
        assert text.startswith("No threshold") and "99.99 %" in text

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

    def test_numbers_of_the_layers_fit_below_a_deep_network(self, record):
        layers = 11 * record["plan"]["layers"]
        deep = altered(record, plan__layers=[row | dict(layer=f"block.{n}") for n, row in enumerate(layers)])
        [axis] = figures.utilization_bars(deep).axes
        assert axis.get_xticks().tolist() == list(range(1, 100, 4))


class TestTable3:
    def test_puts_the_paper_above_what_was_measured(self, record):
        frame = figures.table3([named(record, name, latency=[]) for name in ("cifar10", "cifar100")])
        assert frame.columns.tolist() == [*LABELS[:3], "projected %", *LABELS[3:]]
        sources = [
            (dataset, "vgg11", source) for dataset in ("cifar10", "cifar100") for source in ("paper", "measured")
        ]
        assert frame.index.tolist() == sources
        printed = pd.read_csv(paper.PAPER / "table3_cifar.csv").set_index(["model", "dataset"])
        columns = [
            "original_top1", "original_mlu", "mlu", "decomposed_top1", "delta_printed", "params_ratio", "flops_ratio"
        ]  # fmt: skip
        for dataset in ("cifar10", "cifar100"):
            expected = printed.loc[("VGG11", dataset.upper()), columns].tolist()
            assert frame.loc[(dataset, "vgg11", "paper")].drop("projected %").tolist() == expected
        accuracy, cost, plan = record["accuracy"], record["cost"], record.plan
        assert frame.loc[("cifar10", "vgg11", "measured")].tolist() == pytest.approx(
            [
                accuracy["original"],
                100 * np.mean([entry.weight_rank / min(entry.d, entry.m) for entry in plan.layers]),
                100 * np.mean([entry.rank / min(entry.d, entry.m) for entry in plan.layers]),
                accuracy["projected"],
                accuracy["finetuned"],
                accuracy["finetuned"] - accuracy["original"],
                cost["compact"]["params"] / cost["original"]["params"],
                cost["compact"]["macs"] / cost["original"]["macs"],
            ]
        )

    def test_takes_no_variant_for_a_seed(self, record):
        variant = again(record, variant="isolated", mode="isolated")
        assert figures.table3([record, variant]).equals(figures.table3([record]))

    def test_comes_in_the_papers_order_and_then_what_it_does_not_have(self, record):
        places = [("digits10", "vgg11"), ("cifar100", "vgg11"), ("cifar10", "resnet18"), ("cifar10", "vgg19")]
        frame = figures.table3([altered(record, experiment__dataset=d, experiment__network=n) for d, n in places])
        shown = list(dict.fromkeys(row[:2] for row in frame.index))
        printed = [row[:2] for row in paper.table3()[["dataset", "network"]].itertuples(index=False, name=None)]
        assert shown == sorted(places[1:], key=printed.index) + places[:1] and shown != places

    def test_of_what_the_paper_does_not_have_is_measured_only(self, record):
        assert figures.table3([record]).index.tolist() == [("digits10", "vgg11", "measured")]

    def test_of_nothing_is_empty(self):
        frame = figures.table3([])
        assert len(frame) == 0 and frame.columns.tolist() == LABELS

    def test_as_a_page_shows_it(self, record):
        shown = named(record, "cifar10", accuracy__original=91.234, accuracy__finetuned=91.0, latency=[])
        html = figures.style_table(figures.table3([shown]), "table3").to_html()
        assert html == figures.style_table(figures.table3([shown]), "table3").to_html()  # no random identifier
        cells = [cell.split("<")[0] for cell in html.split('class="data')[1:]]
        cells = [cell.split(">")[-1] for cell in cells]
        assert cells[:8] == ["91.5", "98.0", "47.0", "–", "92.5", "+1.0", "0.34", "0.60"]
        measured = figures.measured_row(shown)
        assert cells[8:] == [
            "91.2", f"{measured['original_mlu']:.1f}", f"{measured['mlu']:.1f}",
            f"{shown['accuracy']['projected']:.1f}", "91.0", "-0.23",
            f"{shown.params_ratio:.2f}", f"{shown.macs_ratio:.2f}",
        ]  # fmt: skip

    def test_of_two_seeds_is_their_mean(self, record):
        seeds = [named(record, "cifar10", experiment__seed=s, accuracy__original=90.0 + s) for s in (0, 1)]
        frame = figures.table3(seeds)
        assert frame.index.get_level_values("source").tolist() == ["paper", "measured, mean of 2"]
        assert frame["original %"].tolist() == [91.5, 90.5]

    def test_has_no_mean_over_fewer_seeds_than_it_says(self, record):
        timed, untimed = record, altered(again(record, seed=1), latency=[])
        assert "speed" in figures.table3([timed]) and "speed" not in figures.table3([timed, untimed])

    def test_has_no_mean_over_what_differs_in_more_than_the_seed(self, record):
        longer = again(record, seed=1, train=record["experiment"]["train"] | dict(epochs=9))
        with pytest.raises(ValueError, match="digits10/vgg11-s1 and digits10/vgg11 share a row of a table"):
            figures.table3([record, longer])
        starts = [again(record, seed=seed, start=f"digits100/vgg11{end}") for seed, end in ((0, ""), (1, "-s1"))]
        assert figures.table3(starts).index.tolist() == [("digits10", "vgg11", "measured, mean of 2")]

    def test_caption_says_what_the_record_holds(self, record):
        text, accuracy, cost = figures.table3_caption(record), record["accuracy"], record["cost"]
        useful = sum(entry.rank * (entry.d + entry.m) < entry.d * entry.m for entry in record.plan.layers)
        assert text.startswith("**vgg11 on digits10.** Splitting all 9 layers")
        assert f"from {accuracy['original']:.2f} % to {accuracy['decomposed']:.2f} %; 2 epochs of fine-tuning" in text
        assert f"bring it to {accuracy['finetuned']:.2f} %. {useful} layers are smaller as two" in text
        assert f"{cost['compact']['params'] / 1e6:.2f} M of {cost['original']['params'] / 1e6:.2f} M parameters" in text


def again(record, **experiment):
    """The record of another experiment that measured the same."""
    return altered(record, experiment=record["experiment"] | experiment)


@pytest.fixture(scope="module")
def several():
    """One record in many roles: a family, two data sets, other weights, other tolerances, a second seed."""
    record = altered(finished()[1], accuracy__baseline=None)

    def like(scale, weights="the plain network's", **experiment):
        layers = [entry | dict(rank=max(1, round(entry["rank"] * scale))) for entry in record["plan"]["layers"]]
        cost = record["cost"] | dict(compact={key: scale * n for key, n in record["cost"]["compact"].items()})
        experiment = record["experiment"] | dict(data={}) | experiment
        return altered(
            record, experiment=experiment, weights=weights, plan__layers=layers, cost=cost,
            accuracy__original=80 * scale, accuracy__merged=70 * scale, accuracy__finetuned=75 * scale,
        )  # fmt: skip

    return [
        like(1.0, dataset="cifar10"),
        like(1.0, "of seed 1", dataset="cifar10", seed=1),
        like(0.9, "of vgg19", dataset="cifar10", network="vgg19"),
        like(0.8, "of resnet18", dataset="cifar10", network="resnet18"),
        like(0.7, "of cifar100", dataset="cifar100"),
        like(0.6, "of the probe", dataset="cifar10", variant="linear-probe", start="cifar100/vgg11"),
        like(0.5, dataset="cifar10", variant="eps5", tolerance=5.0),
        like(0.95, dataset="cifar10", variant="eps0.5", tolerance=0.5),
    ]


class TestDeviation:
    def places(self, record):
        places = [("cifar10", "vgg11"), ("cifar100", "vgg19"), ("cifar100", "resnet18"), ("digits10", "vgg11")]
        return [altered(record, experiment__dataset=d, experiment__network=n) for d, n in places]

    def test_draws_what_is_measured_over_what_is_printed(self, record):
        table = figures.table3(self.places(record))
        panels = figures.deviation(table).axes
        assert [axis.get_title() for axis in panels] == ["MLU %", "params", "MACs", "change"]
        for axis in panels:
            diagonal, *points = axis.get_lines()
            assert diagonal.get_slope() == 1 and axis.get_xlim() == axis.get_ylim()
            column = table[axis.get_title()]
            shared = [("cifar10", "vgg11"), ("cifar100", "vgg19"), ("cifar100", "resnet18")]
            expected = [(column[(*place, "paper")], column[(*place, "measured")]) for place in shared]
            assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == expected
            assert [text.get_text() for text in axis.texts] == ["11", "19", "18"]
            one, two, three = points
            assert one.get_color() != two.get_color() == three.get_color()
            assert one.get_marker() == two.get_marker() != three.get_marker()

    def test_says_how_far_apart_they_are(self, record):
        table = figures.table3(self.places(record))
        text = figures.deviation_caption(table)
        mlu = [abs(100 * record.plan.mlu - printed) for printed in (47, 51, 90)]
        furthest = ["vgg11 on cifar10", "vgg19 on cifar100", "resnet18 on cifar100"][int(np.argmax(mlu))]
        assert text.startswith("Mean distance from the paper's 3 rows: original ")
        assert f"MLU {np.mean(mlu):.2g} points (at most {max(mlu):.2g}: {furthest})" in text

    def test_leaves_out_the_change_where_nothing_was_fine_tuned(self, record):
        untuned = named(record, "cifar10", experiment__finetune__epochs=0)
        assert "change" not in figures.deviation_caption(figures.table3([untuned]))

    def test_of_networks_that_the_paper_does_not_have(self, record):
        table = figures.table3([record])
        assert figures.deviation_caption(table) == "None of these rows is one of the paper's."
        figures.deviation(table)


class TestSpeedup:
    def test_of_each_device_precision_and_batch(self, record):
        rows = [timed("original", 100.0), timed("compact", 150.0), timed("original", 40.0, batch=1)]
        rows += [
            timed("compact", 30.0, batch=1),
            timed("original", 9.0, device="b"),
            timed("compact", 18.0, device="b"),
        ]
        table = figures.speedup_table([altered(record, latency=rows)])
        assert table.columns.tolist() == [("float32", 1), ("float32", 256)]
        assert table.index.tolist() == [("digits10", "vgg11", "a"), ("digits10", "vgg11", "b")]
        assert table.iloc[0].tolist() == [0.75, 1.5] and np.isnan(table.iloc[1, 0]) and table.iloc[1, 1] == 2.0
        assert figures.speedup_caption(table) == (
            "The compact network is the faster one: float32, 1 a batch: in 0 of 1; float32, 256 a batch: in 2 of 2."
        )
        assert "float32, 256" in figures.style_speedup(table, "speedup").to_html()

    def test_of_several_seeds_is_the_mean(self, record):
        runs = [
            altered(record, experiment__seed=seed, latency=[timed("original", 10.0), timed("compact", compact)])
            for seed, compact in ((0, 10.0), (1, 20.0))
        ]
        variant = altered(again(runs[1], variant="shorter"), latency=[timed("original", 1.0), timed("compact", 9.0)])
        assert figures.speedup_table([*runs, variant]).to_numpy().tolist() == [[1.5]]
        assert figures.speedup_table([variant]).empty

    def test_bfloat16_comes_last(self, record):
        rows = [timed(name, 1.0, precision=precision) for precision in PRECISIONS for name in ("original", "compact")]
        table = figures.speedup_table([altered(record, latency=rows)])
        assert table.columns.tolist() == [("float32", 256), ("bfloat16", 256)]


PRECISIONS = ("bfloat16", "float32")


def timed(network, speed, batch=256, device="a", precision="float32"):
    return dict(network=network, images_per_second=speed, batch=batch, device=device, precision=precision)


class TestContrasts:
    def test_choose_what_differs_in_one_thing(self, several):
        plain, _, vgg19, _, harder, probe, loose, strict = several
        assert figures.families(several) == [[plain, vgg19]]
        assert figures.complexities(several) == [[plain, harder]]
        assert figures.pretrainings(several) == [plain, probe]
        assert figures.tolerances(several) == [strict, plain, loose]

    def test_tell_other_weights_from_another_search(self, several):
        """A network that saw fewer images, or was searched otherwise, came to its weights as the plain one did."""
        plain, probe = several[0], several[5]
        taken = dict(train=plain["experiment"]["train"] | dict(epochs=0), start="cifar10/vgg11")
        held_out = altered(again(plain, variant="held-out", holdout=5000), weights="of held-out")
        isolated = again(plain, variant="isolated", mode="isolated", **taken)
        published = altered(again(plain, variant="swag", pretrained="SWAG", train=taken["train"]), weights="published")
        looser = again(published, variant="swag-eps", tolerance=9.0)
        thinner = altered(again(probe, variant="thin", width=0.5), weights="of the thin one")
        few = again(plain, variant="few", validation=7, tolerance=9.0, **taken)
        records = [plain, held_out, isolated, probe, published, looser, thinner, few]
        assert figures.pretrainings(records) == [plain, probe, published]
        assert figures.tolerances(records) == []

    def test_keep_to_one_seed(self, several):
        plain, other, *_, strict = several
        strict_of_other = altered(again(strict, seed=1), weights=other["weights"])
        assert figures.tolerances([plain, other, strict_of_other]) == [strict_of_other, other]
        isolated = again(strict_of_other, tolerance=plain.plan.tolerance, mode="isolated")
        assert figures.protocols([plain, other, isolated]) == [[other, isolated]]
        both = [plain, again(plain, variant="x", mode="isolated"), isolated, other]
        assert figures.protocols(both) == [both[:2]]

    def test_labels_say_all_that_differs(self, several):
        plain, seed_1, vgg19, resnet, harder, probe, *_ = several
        records = [plain, vgg19, resnet, harder]
        table = figures.measured_points(records)
        assert table["label"].tolist() == ["vgg11, cifar10", "vgg19, cifar10", "resnet18, cifar10", "vgg11, cifar100"]
        assert figures.measured_points([plain, seed_1])["label"].tolist() == ["seed 0", "seed 1"]
        end_to_end = altered(again(probe, variant="end-to-end"), weights="of all")
        assert figures.measured_points([probe, end_to_end])["label"].tolist() == ["linear probe", "end to end"]

    def test_are_empty_where_there_are_not_two(self, record):
        for choose in (figures.families, figures.complexities, figures.pretrainings, figures.tolerances):
            assert choose([record]) == choose([]) == []

    def test_show_every_plain_record_once_or_more(self, several):
        plain, _, vgg19, resnet, harder, probe, loose, strict = several
        assert list(figures.comparisons(several).values()) == [[[plain, vgg19]], [[plain, harder]], [[plain, probe]]]
        harder_19 = again(harder, network="vgg19")
        assert figures.families([*several, harder_19]) == [[plain, vgg19], [harder, harder_19]]
        assert figures.complexities([*several, harder_19]) == [[plain, harder], [vgg19, harder_19]]
        assert figures.drawn_alone(several) == [resnet]
        assert figures.drawn_alone([plain, loose]) == [plain]

    def test_take_the_lowest_seed_whatever_the_order(self, several):
        plain, _, vgg19, *_ = several
        assert figures.families(several[::-1]) == [[vgg19, plain]]


class TestProtocol:
    @pytest.fixture
    def ways(self, several):
        plain = several[0]
        taken = dict(train=plain["experiment"]["train"] | dict(epochs=0), start="cifar10/vgg11")
        isolated = again(plain, variant="isolated", mode="isolated", **taken)
        backward = altered(again(plain, variant="backward", order="backward", **taken), calibration_images=2000)
        least = [entry | dict(rank=1) for entry in plain.plan.to_dict()["layers"]]
        few = altered(again(plain, variant="few", validation=7, **taken), plan__layers=least, accuracy__projected=5.0)
        return [plain, altered(isolated, plan__mode="isolated"), backward, few]

    def test_chooses_searches_of_one_network(self, several, ways):
        assert figures.protocols([*ways[::-1], *several[1:]]) == [[ways[0], ways[3], *ways[2:0:-1]]]

    def test_compares_held_out_with_test_images_on_one_network(self, ways):
        plain, *_ = ways
        held_out = altered(again(plain, variant="held-out", holdout=5000), weights="of held-out")
        on_test = again(plain, variant="on-test", start="cifar10/vgg11@held-out", train=ways[1]["experiment"]["train"])
        on_test = altered(on_test, weights="of held-out")
        groups = figures.protocols([held_out, *ways, on_test])
        assert groups[0] == [on_test, held_out] and len(groups) == 2
        assert figures.protocol_table(groups[0]).index.tolist() == ["on test images", "on 5,000 held-out images"]
        full = [altered(one, experiment__dataset="cifar10", experiment__width=1) for one in groups[0]]
        assert "The paper prints" not in figures.protocol_caption(full)  # its network saw all training images
        trained = "vgg11 on cifar10, trained for 4 epochs without the last 5,000 training images"
        assert trained in figures.protocol_caption(groups[0])
        assert figures.protocols([held_out, plain]) == []

    def test_takes_another_network_for_none_of_its_searches(self, ways):
        plain, isolated, *_ = ways
        assert figures.protocols([plain, altered(isolated, weights="others")]) == []

    def test_shows_a_search_once_however_often_it_was_fine_tuned(self, ways):
        plain, isolated, *_ = ways
        longer = again(plain, variant="longer", finetune=plain["experiment"]["finetune"] | dict(epochs=9))
        assert figures.protocols([longer, plain]) == []
        assert figures.protocols([longer, isolated, plain]) == [[plain, isolated]]

    def test_ways_of_one_name_are_two_rows(self, ways):
        assert len(figures.protocol_table([*ways, ways[1]])) == 5

    def test_table_compares_with_the_first(self, ways):
        frame, plain = figures.protocol_table(ways), ways[0]
        assert frame.index.tolist() == [
            "default",
            "each layer by itself",
            "backward, with 2,000 calibration images",
            "with 7 validation images",
        ]
        assert frame["MLU %"].iloc[0] == pytest.approx(100 * plain.plan.mlu)
        most = max(entry.utilization - 1 / min(entry.d, entry.m) for entry in plain.plan.layers)
        assert frame["moved by at most"].tolist() == pytest.approx([0, 0, 0, 100 * most])
        layers, base = plain.plan.layers, plain.plan.correct
        lost = [100 * (base - layers[end].correct) / plain.plan.total for end in (-1, 0, -1)]
        assert frame["lost, consulted"].drop(frame.index[1]).tolist() == pytest.approx(lost)
        assert frame["lost, consulted"].isna().tolist() == [False, True, False, False]
        assert frame["lost, test"].iloc[3] == pytest.approx(80 - 5)

    def test_caption_names_the_extremes(self, ways):
        caption, frame = figures.protocol_caption(ways), figures.protocol_table(ways)
        assert f"between {frame['MLU %'].min():.1f} % (*with 7 validation images*)" in caption
        assert "cost up to 75.00 points of accuracy on the test images (*with 7 validation images*)" in caption
        moved = frame["moved by at most"]
        assert f"moves by up to {moved.max():.1f} points (*with 7 validation images*)" in caption

    def test_caption_compares_with_what_the_paper_prints(self, ways):
        assert "The paper" not in figures.protocol_caption(ways)
        full = [altered(way, experiment__dataset="cifar10", experiment__width=1) for way in ways]
        mlu = figures.protocol_table(full)["MLU %"]
        nearest = min(mlu.index, key=lambda name: abs(mlu[name] - 47))
        caption = figures.protocol_caption(full)
        assert f"MLU of 47 % and params x 0.34; the nearest MLU is {mlu[nearest]:.1f} % (*{nearest}*)." in caption

    def test_snapshot_names_the_ways(self, ways):
        lines = figures.snapshot(ways).axes[0].get_lines()[1:-1:2]
        assert "backward" in lines[2].get_label()


class TestFinetuning:
    @pytest.fixture
    def ways(self, several):
        plain = altered(several[0], accuracy__baseline=79.5)
        recipe = plain["experiment"]["finetune"]
        taken = dict(train=plain["experiment"]["train"] | dict(epochs=0), start="cifar10/vgg11")
        longer = again(plain, variant="longer", finetune=recipe | dict(epochs=recipe["epochs"] + 9), **taken)
        return [plain, altered(longer, accuracy__finetuned=81.5, accuracy__baseline=81.75)]

    def test_chooses_one_network_split_once(self, several, ways):
        plain, longer = ways
        assert figures.finetunings([longer, plain, *several[1:]]) == [[plain, longer]]
        least = [entry | dict(rank=1) for entry in plain.plan.to_dict()["layers"]]
        not_at_all = again(longer, finetune=longer["experiment"]["finetune"] | dict(epochs=0))
        faster = again(plain, variant="x", finetune=plain["experiment"]["finetune"] | dict(capture=True))
        for other in (altered(longer, weights="others"), altered(longer, plan__layers=least), not_at_all, faster):
            assert figures.finetunings([plain, other]) == []

    def test_keeps_to_one_seed(self, several, ways):
        _, seed_1, *_ = several
        longer_of_1 = altered(again(ways[1], seed=1), weights=seed_1["weights"])
        assert figures.finetunings([longer_of_1, seed_1, *ways]) == [ways]
        assert figures.finetunings([longer_of_1, seed_1, ways[0]]) == [[seed_1, longer_of_1]]

    def test_table_counts_from_the_original(self, ways):
        frame, epochs = figures.finetuning_table(ways), ways[0]["experiment"]["finetune"]["epochs"]
        assert frame.index.tolist() == [epochs, epochs + 9]
        assert frame.iloc[1].tolist() == [0.01, 81.5, 1.5, 81.75, 1.75]

    def test_caption_says_where_each_ends(self, ways):
        caption = figures.finetuning_caption(ways)
        assert "The original reaches 80.00 %." in caption and "ends 5.00 points below it after 2 epochs" in caption
        assert "(learning rate 0.01), and 1.50 points above it after 11 epochs" in caption
        assert "it ends 4.50 points below after 2 epochs and 0.25 points below after 11; one run of each." in caption
        alone = [altered(way, accuracy__baseline=None) for way in ways]
        assert "full-rank" not in figures.finetuning_caption(alone)
        full = [altered(way, experiment__dataset="cifar10", experiment__width=1) for way in ways]
        assert "The paper prints a change of +1.0 points." in figures.finetuning_caption(full)


class TestTraining:
    @pytest.fixture
    def ways(self, several):
        plain = several[0]
        longer = altered(again(plain, train=plain["experiment"]["train"] | dict(epochs=40)), weights="of 40 epochs")
        shorter = again(plain, variant="trained-shorter")
        return [altered(shorter, accuracy__original=70.0, accuracy__finetuned=72.0), longer]

    def test_chooses_one_network_trained_otherwise_and_searched_alike(self, several, ways):
        shorter, longer = ways
        assert figures.trainings([longer, shorter, *several[1:]]) == [ways]
        taken = again(shorter, start="cifar10/vgg11")
        searched = again(shorter, mode="isolated")
        thin = again(shorter, width=0.5)
        same = altered(again(longer, variant="x"), weights="of another machine")
        captured = again(same, train=same["experiment"]["train"] | dict(capture=True))
        tuned = again(longer, variant="x", train=longer["experiment"]["train"] | dict(epochs=0), start="cifar10/vgg11")
        for other in (taken, searched, thin, same, captured, tuned):
            assert figures.trainings([longer, other]) == []
        assert figures.trainings(several) == []

    def test_table_has_a_row_a_way(self, ways):
        frame = figures.training_table(ways)
        assert [training for training, _ in frame.index] == [ways[0]["experiment"]["train"]["epochs"], 40]
        assert frame["original %"].tolist() == [70.0, 80.0] and frame["change"].iloc[0] == 2.0
        assert "<td" in figures.style_training(frame, "training").to_html()

    def test_caption_says_where_each_ends(self, ways):
        caption = figures.training_caption(ways)
        assert "the original reaches 70.00 %" in caption and "After 40 epochs the original reaches 80.00 %" in caption
        assert caption.count("ends 2.00 points above its original.") == 1
        assert "ends 5.00 points below its original." in caption
        untuned = [again(way, finetune=way["experiment"]["finetune"] | dict(epochs=0)) for way in ways]
        assert "nan" not in figures.training_caption(untuned)


class TestRepetition:
    @pytest.fixture
    def seeds(self, several):
        measured = dict(accuracy__original=82.0, accuracy__finetuned=75.5, accuracy__baseline=77.0)
        return [altered(several[0], accuracy__baseline=77.5), altered(several[1], **measured)]

    def test_chooses_plain_networks_of_several_seeds(self, several, seeds):
        first, second = seeds
        assert figures.repeated([second, *several[2:], first]) == [[first, second]]
        assert figures.repeated([first, again(second, variant="longer"), *several[2:]]) == []

    def test_table_ends_with_mean_and_deviation(self, seeds):
        frame = figures.repetition_table(seeds)
        assert frame.index.tolist() == [0, 1, "mean", "standard deviation"] and frame.index.name == "seed"
        assert frame["original %"].tolist() == pytest.approx([80, 82, 81, 2**0.5])
        assert frame["change"].tolist() == pytest.approx([-5, -6.5, -5.75, 1.5 / 2**0.5])
        html = figures.style_repetition(frame, "seeds").to_html()
        assert ">-5.75<" in html and ">1.06<" in html

    def test_has_no_mean_where_a_seed_lacks_a_number(self, seeds):
        frame = figures.repetition_table([altered(seeds[0], accuracy__baseline=None), seeds[1]])
        assert frame["full rank %"].isna().tolist() == [True, False, True, True]

    def test_caption_has_both(self, seeds):
        caption = figures.repetition_caption(seeds)
        assert caption.startswith("**vgg11 on cifar10.** Over 2 seeds, as mean and standard deviation, the original")
        assert "reaches 81.00 ± 1.41 %" in caption
        assert "ends 5.75 ± 1.06 points below its original, 2.00 ± 0.71 points below the full-rank network" in caption
        alone = figures.repetition_caption([altered(seeds[0], accuracy__baseline=None), seeds[1]])
        assert alone.endswith("points below its original.")
        untuned = [again(one, finetune=one["experiment"]["finetune"] | dict(epochs=0)) for one in seeds]
        assert "fine-tuned" not in figures.repetition_caption(untuned)


class TestSnapshot:
    def test_draws_the_ranks_of_every_layer(self, several):
        [chosen] = figures.families(several)
        *lines, _ = figures.snapshot(chosen, "a title").axes[0].get_lines()
        for (dotted, solid), record in zip(zip(lines[::2], lines[1::2]), chosen, strict=True):
            layers = record.plan.layers
            assert dotted.get_ydata().tolist() == [entry.weight_rank for entry in layers]
            assert solid.get_ydata().tolist() == [entry.rank for entry in layers]
            assert dotted.get_xdata().tolist() == solid.get_xdata().tolist() == list(range(1, 10))
            assert (dotted.get_linestyle(), solid.get_linestyle()) == (":", "-")
            assert dotted.get_color() == solid.get_color()
            ends = record["cost"]["original"]["params"], record["cost"]["compact"]["params"]
            before, after = (f"{count / 1e6:.{3 if count < 1e5 else 2}f} M" for count in ends)
            accuracy = record["accuracy"]
            expected = f"({before}, {accuracy['original']:.1f} %) → ({after}, {accuracy['merged']:.1f} %)"
            assert solid.get_label() == f"{record['experiment']['network']} {expected}"

    def test_compares_accuracies_of_one_stage(self, several):
        [[tuned, other]] = figures.families(several)
        other = altered(other, experiment__finetune=other["experiment"]["finetune"] | dict(epochs=0))
        *lines, note = figures.snapshot([tuned, other]).axes[0].get_lines()
        assert tuned["accuracy"]["decomposed"] != tuned["accuracy"]["merged"]
        assert f", {tuned['accuracy']['decomposed']:.1f} %)" in lines[1].get_label().split("→")[1]
        assert "before fine-tuning" in note.get_label()

    @pytest.mark.parametrize(
        "choose, names",
        [
            (lambda several: figures.complexities(several)[0], ["cifar10", "cifar100"]),
            (figures.pretrainings, ["from scratch", "linear probe"]),
            (figures.tolerances, ["$\\epsilon$ = 0.5", "$\\epsilon$ = 1.25", "$\\epsilon$ = 5"]),
        ],
    )
    def test_names_what_differs(self, several, choose, names):
        lines = figures.snapshot(choose(several)).axes[0].get_lines()[1:-1:2]
        assert [line.get_label().split(" (")[0] for line in lines] == names

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one record"):
            figures.snapshot([])

    def test_caption_names_the_peak_and_the_largest_mlu(self, several):
        [chosen] = figures.complexities(several)
        text = figures.snapshot_caption(chosen)
        for record in chosen:
            ranks = [entry.rank for entry in record.plan.layers]
            assert f"largest at layer {1 + ranks.index(max(ranks))} of 9 ({max(ranks)} of" in text
        shares = [100 * record.plan.mlu for record in chosen]
        assert text.endswith(
            f"The MLU of **cifar10** is {shares[0] - shares[1]:.1f} points above that of **cifar100**."
        )
        assert text.startswith("**vgg11.** cifar10: the utilized rank")
        assert figures.snapshot_caption(figures.families(several)[0]).startswith("**cifar10.** vgg11: ")
        alone = figures.snapshot_caption(chosen[:1])
        assert alone.startswith("**vgg11 on cifar10.** The utilized rank") and "above" not in alone

    def test_caption_of_three_names_the_largest(self, several):
        assert "** is the largest, " in figures.snapshot_caption(figures.tolerances(several))

    def test_caption_compares_with_the_paper_and_names_other_lengths_of_training(self, several):
        easy, hard = (altered(one, experiment__width=1) for one in figures.complexities(several)[0])
        text = figures.snapshot_caption([easy, hard])
        assert "(the paper's: -17)." in text and "trained for" not in text  # 47 and 64 %, the other way round
        longer = altered(hard, experiment__train=hard["experiment"]["train"] | dict(epochs=30))
        caption = figures.snapshot_caption([easy, longer])
        assert caption == text + " The former was trained for 4 epochs, the latter for 30."

    def test_caption_names_all_layers_of_the_largest_rank(self, record):
        layers = record.plan.to_dict()["layers"]
        layers = [layer | dict(rank=16 if number in (4, 5) else 1) for number, layer in enumerate(layers, 1)]
        text = figures.snapshot_caption([altered(record, plan__layers=layers)])
        first, second = (min(layer["d"], layer["m"]) for layer in layers[3:5])
        assert f"largest at layers 4 and 5 of 9 (16 of {first} and {second})" in text
        layers = [layer | dict(rank=1) for layer in layers]
        assert "largest in 9 of 9 layers (1)" in figures.snapshot_caption([altered(record, plan__layers=layers)])


class TestTradeoff:
    def bubbles(self, figure):
        return [(*circle.get_offsets()[0], circle.get_sizes()[0]) for circle in figure.axes[0].collections]

    @pytest.mark.parametrize(
        "smallest, largest", [(0.47, 0.59), (0.2, 9.2), (0.0051, 0.0052), (0.004, 0.15), (0.002, 90)]
    )
    def test_numbers_the_axis_of_parameters_at_three_to_nine_places(self, smallest, largest):
        row = dict(original_macs=1, compact_macs=1, original_top1=90, compact_top1=89, label="a network")
        points = pd.DataFrame([row | dict(original_params=1e6 * largest, compact_params=1e6 * smallest)])
        axis = figures.tradeoff(points).axes[0]
        low, high = axis.get_xlim()
        shown = [float(tick.get_text()) for tick in axis.get_xticklabels()]
        assert 3 <= len(shown) <= 9 and all(low <= number <= high for number in shown)

    def test_draws_before_and_after_with_the_area_of_the_macs(self, several):
        [chosen] = figures.families(several)
        figure = figures.tradeoff(figures.measured_points(chosen))
        expected = [
            (cost["params"] / 1e6, accuracy, 900 * cost["macs"] / chosen[0]["cost"]["original"]["macs"])
            for record in chosen
            for cost, accuracy in (
                (record["cost"]["original"], record["accuracy"]["original"]),
                (record["cost"]["compact"], record["accuracy"]["merged"]),
            )
        ]
        np.testing.assert_allclose(self.bubbles(figure), expected)
        arrows = [text for text in figure.axes[0].texts if text.arrow_patch is not None]
        assert [(*arrow.xyann, *arrow.xy) for arrow in arrows] == [
            pytest.approx((*start[:2], *end[:2])) for start, end in zip(expected[::2], expected[1::2])
        ]

    def test_takes_the_data_sets_apart(self, several):
        plain = figures.plain(several)
        groups = figures.by_dataset(figures.measured_points(plain))
        assert len(groups) > 1 and sum(map(len, groups.values())) == len(plain)
        for dataset, points in groups.items():
            assert points["label"].tolist() == [name for data, name in map(place, plain) if data == dataset]
            assert points.index.tolist() == list(range(len(points)))

    def test_draws_the_paper_s_rows_of_the_same_networks_hollow(self, several):
        points = figures.measured_points(figures.families(several)[0])
        printed = figures.beside(points, paper.tradeoff(paper.table3()))
        assert list(zip(printed["network"], printed["dataset"])) == [("vgg11", "cifar10"), ("vgg19", "cifar10")]
        axis = figures.tradeoff(points, printed).axes[0]
        hollow = [circle for circle in axis.collections if len(circle.get_facecolor()) == 0]
        assert [circle.get_offsets()[0][1] for circle in hollow] == [91.5, 92.5, 92.7, 93.6]
        assert len(axis.collections) == 8

    def test_of_networks_that_the_paper_does_not_have(self, record):
        assert figures.beside(figures.measured_points([record]), paper.tradeoff(paper.table3())) is None

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one network"):
            figures.tradeoff(pd.DataFrame())

    def test_caption_says_what_the_points_hold(self, several):
        points = figures.measured_points(figures.tolerances(several))
        text = figures.tradeoff_caption(points)
        kept = points["compact_params"] / points["original_params"]
        assert text.startswith(f"**$\\epsilon$ = 5** keeps the smallest share of its parameters (x {kept.min():.2f}")
        assert f"**$\\epsilon$ = 1.25** the largest (x {kept.max():.2f}" in text
        assert "-10.0 to -5.0 points, best for" in text
        alike = figures.tradeoff_caption(points.assign(compact_top1=points["original_top1"] - 0.4))
        assert alike.endswith("Accuracy moves by -0.4 points for each.")
        assert figures.tradeoff_caption(points[:1]).endswith("of its MACs. Accuracy moves by -9.5 points.")
        printed = paper.tradeoff(paper.table3())
        assert figures.tradeoff_caption(points, printed).endswith("The paper prints +0.3 to +2.1 points for the same.")


class TestOtherTables:
    def test_table4_names_how_the_weights_came_about(self, several):
        frame = figures.table4(figures.pretrainings(several))
        assert frame.index.get_level_values("weights").tolist() == ["from scratch", "linear probe"]
        assert frame["original %"].tolist() == pytest.approx([80, 48])

    def test_table5_goes_by_tolerance(self, several):
        chosen = figures.tolerances(several)
        frame = figures.table5(chosen)
        assert frame.index.get_level_values("tolerance").tolist() == [0.5, 1.25, 5.0]
        assert frame["MLU %"].tolist() == pytest.approx([100 * record.plan.mlu for record in chosen])
        html = figures.style_table(frame, "table5").to_html()
        assert all(f">{tolerance}<" in html for tolerance in ("0.5", "1.25", "5"))

    def test_tables_put_the_paper_above(self, record):
        vit = dict(experiment__network="torchvision/vit_b_16", experiment__dataset="imagenet-1k")
        sources = lambda frame: frame.index.get_level_values("source").tolist()  # noqa: E731
        assert sources(figures.table1([altered(record, **vit)])) == ["paper", "measured"]
        assert sources(figures.table4([altered(record, **vit, experiment__variant="end-to-end")]))[0] == "paper"
        table5 = figures.table5([altered(record, **vit, experiment__tolerance=0.05)])
        assert table5.loc[("imagenet-1k", "torchvision/vit_b_16", 0.05, "paper"), "MLU %"] == 38.7

    def test_speed_is_shown_where_it_was_timed(self, record):
        row = dict(device="one", precision="float32", batch=256)
        latency = [
            row | dict(network="original", images_per_second=100.0),
            row | dict(network="compact", images_per_second=150.0),
            row | dict(network="original", images_per_second=900.0, precision="bfloat16"),
            row | dict(network="compact", images_per_second=900.0, precision="bfloat16"),
        ]
        assert figures.table3([altered(record, latency=latency)])["speed"].tolist() == [1.5]
        assert "speed" not in figures.table3([altered(record, latency=[])])

    def test_full_rank_baseline_is_shown_where_it_was_run(self, record):
        assert "full rank %" not in figures.table3([record])
        frame = figures.table3([altered(record, accuracy__baseline=77.0)])
        assert frame["full rank %"].tolist() == [77.0]
        text = figures.table3_caption(altered(record, accuracy__baseline=77.0, accuracy__finetuned=76.0))
        assert "reaches 77.00 %; the split one ends 1.00 points below it, one run of each" in text

    @pytest.mark.parametrize("number, rows", [(1, 16), (3, 14), (4, 3), (5, 4)])
    def test_the_paper_s_own(self, number, rows):
        html = getattr(figures, f"paper_table{number}")().to_html()
        assert html.count("<tr>") == 2 + rows and "nan" not in html
        assert number != 3 or "+2.1" in html

    def test_captions_say_what_the_records_hold(self, several):
        probe, tolerance = figures.pretrainings(several), figures.tolerances(several)
        text = figures.table4_caption(probe)
        assert "It is highest for **from scratch**, lowest for **linear probe**. The paper's order, from" in text
        assert "the highest, is another: linear probe, from scratch. Split" in text
        gain = probe[1]["accuracy"]["finetuned"] - probe[1]["accuracy"]["original"]
        assert f"The linear probe's {signed(gain)} says nothing of the method" in text
        assert re.search(r"Split and fine-tuned, accuracy moves by \S+ points \(", text)  # that of the only other one
        assert "from the highest, is the same." in figures.table4_caption(probe[:1])
        assert "The paper's" not in figures.table4_caption([altered(probe[0], experiment__variant="other")])
        text = figures.table5_caption(tolerance)
        assert text.startswith("From $\\epsilon$ = 0.5 to 5 points the MLU goes from")
        assert text.endswith("The original has 76.0 %; none of 3 are back there.")
        assert figures.table5_caption(tolerance[:1]).startswith("Searched at one tolerance alone, $\\epsilon$ = 0.5")
        assert "smallest" not in figures.table1_caption(several[:1]) and "-5.0" in figures.table1_caption(several[:1])
        assert "-5.0" in figures.table1_caption(several[:3]) and "chance" not in figures.table1_caption(several[:3])

    def test_one_architecture_timed_at_two_speeds_is_called_so(self, several):
        ways = figures.pretrainings(several)
        timing = dict(network="original", batch=256, device="a machine", precision="float32")

        def caption(*speeds, **others):
            rows = [[timing | dict(images_per_second=speed) | others] for speed in speeds]
            return figures.table4_caption([altered(one, latency=row) for one, row in zip(ways, rows, strict=True)])

        assert "timed at 300 to 800 images a second" in caption(300, 800)
        assert "timed at" not in caption(300, 400) and "timed at" not in caption(300, 800, batch=1)

    def test_a_network_near_chance_is_called_so(self, record):
        text = figures.table1_caption([altered(record, accuracy__original=12.0)])
        assert "hardly better than chance (vgg11 12 %, chance 10 %)" in text


class TestTable2:
    def test_marks_the_impossible_alone(self):
        html = figures.paper_table2().to_html()
        assert html.count("(not legible)") == 2 and html.count("#f6d5d0") == 1
        [rule] = [line for line in html.replace("{", "\n{").split("\n") if "#T_table2-printed_row" in line][:1]
        assert rule.count("#T_table2-printed_row") == 1

    def test_caption_names_them(self):
        text = figures.table2_caption()
        assert text.startswith("2 cells are not legible: optimizer (ResNets, ImageNet), optimizer (CIFAR).")
        assert "weight decay [50, 100, 130] (CIFAR)" in text

    def test_recipes_are_those_that_run(self, record):
        frame = figures.recipes({"digits10/vgg11": record.experiment}).data
        assert frame.index.tolist() == [("digits10/vgg11", "train"), ("digits10/vgg11", "finetune")]
        for stage in ("train", "finetune"):
            row, recipe = frame.loc[("digits10/vgg11", stage)], getattr(record.experiment, stage)
            assert (row["epochs"], row["lr"]) == (str(recipe.epochs), f"{recipe.lr:g}")
            assert row.index.tolist() == list(vars(recipe))

    def test_recipes_show_what_differs_and_say_what_does_not(self, record):
        experiments = {"digits10/vgg11": record.experiment}
        train, finetune = (vars(getattr(record.experiment, stage)) for stage in ("train", "finetune"))
        same = [name for name in train if train[name] == finetune[name]]
        assert "momentum" in same and "lr" not in same
        shown = re.findall(
            r'<th id="[^"]*" class="col_heading[^>]*>([^<]*)</th>', figures.recipes(experiments).to_html()
        )
        assert shown == [name.replace("_", " ") for name in train if name not in same]
        assert re.findall(r"`(\w+)`", figures.recipes_caption(experiments)) == same
        assert "`momentum` 0.9" in figures.recipes_caption(experiments)

    def test_one_recipe_is_shown_whole(self, record):
        taken = {"taken": replace(record.experiment, train=replace(record.experiment.train, epochs=0))}
        assert "momentum" in figures.recipes(taken).to_html() and figures.recipes_caption(taken) == ""

    def test_recipes_leave_out_fits_that_are_not_run(self, record):
        taken = replace(record.experiment, train=replace(record.experiment.train, epochs=0))
        assert figures.recipes({"taken": taken}).data.index.tolist() == [("taken", "finetune")]
        neither = replace(taken, finetune=taken.train)
        assert figures.recipes({"neither": neither}).data.empty


def test_provenances_are_one_line_a_run(several):
    frame = figures.provenances(several[:2] + several[5:]).data
    assert frame.index.tolist() == [
        "cifar10/vgg11",
        "cifar10/vgg11-s1",
        *(f"cifar10/vgg11@{v}" for v in ("linear-probe", "eps5", "eps0.5")),
    ]
    assert frame["tolerance"].tolist() == ["1.25", "1.25", "1.25", "5", "0.5"]


def test_plan_and_probes_are_those_of_the_record(record):
    assert figures.plan_table(record).data["rank"].tolist() == [entry.rank for entry in record.plan.layers]
    layer = record.plan.layers[1].layer
    assert figures.probes_table(record, layer).data["k"].tolist() == [
        probe.k for probe in record.plan.probes if probe.layer == layer
    ]


def test_provenance_names_the_run(record):
    values = figures.provenance(record).data.iloc[:, 0]
    assert values["network"] == "vgg11, width 0.125" and values["data set"] == "digits10" and values["seed"] == 0
    assert values["epochs"] == "4 of training, 2 of fine-tuning"
    assert values["search"] == "tolerance 1.25 points, joint, on 80 test images"
    assert values["calibration"] == "150 training images"
    assert values["date"] == record["made"]["finetune"]["date"]
    assert values["device"] == record["made"]["train"]["device"]
    assert values["fitted in"] == "float32"
    assert f"torch {record['versions']['torch']}" in values["versions"] and "train " in values["seconds"]


def test_epochs_that_do_not_say_in_which_arithmetic_are_not_guessed_at(record):
    first, *rest = record["history"]["train"]
    older = {name: value for name, value in first.items() if name != "precision"}
    mixed = altered(record, history__train=[older, *rest])
    assert figures.provenance(mixed).data.iloc[:, 0]["fitted in"] == "float32, not noted"
    unfitted = altered(record, history={"train": [], "finetune": [], "baseline": []})
    assert figures.provenance(unfitted).data.iloc[:, 0]["fitted in"] == "–"


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
