from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import finished
from matplotlib.colors import to_rgb

from urank.reproduction import figures, paper
from urank.reproduction.figures.groups import place
from urank.reproduction.figures.style import GREY, network_color, signed
from urank.reproduction.profiles import load_profile
from urank.reproduction.record import Record
from urank.training.recipe import Recipe

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
    """The record with other values at "outer__inner" fields; another network or data set has no options or sweep."""
    content = record.to_dict()
    for key, value in changes.items():
        *outer, last = key.split("__")
        inside = content
        for part in outer:
            inside = inside[part]
        inside[last] = value
    if content["experiment"]["dataset"] != "digits10" or content["experiment"]["network"] != "vgg11":
        content["experiment"] |= dict(data={}, sweep=[])
    return Record.from_dict(content)


def again(record, **settings):
    """The record of another experiment that measured the same."""
    return altered(record, **{f"experiment__{name}": value for name, value in settings.items()})


def recipe(record, fit, **settings):
    return asdict(replace(getattr(record.experiment, fit), **settings))


@pytest.fixture(autouse=True)
def record_stays(record):
    before = record.to_dict()
    yield
    assert record.to_dict() == before


def test_a_network_has_one_colour_on_every_page(several):
    chosen = figures.differing_in_dataset(several)[0]
    drawn = [line.get_color() for axis in figures.snapshot(chosen).axes for line in axis.get_lines()]
    drawn += [line.get_color() for line in figures.spectra(chosen[0]).axes[0].get_lines()]
    drawn += [figures.tradeoff(figures.measured_points(chosen)).axes[0].texts[1].get_color()]
    assert set(drawn) == {network_color("vgg11")}
    assert len({network_color(name) for name in ("vgg11", "vgg19", "resnet18", "vit", "other")}) == 5


class TestSpectra:
    def test_draws_the_energy_held_by_the_first_directions(self, record):
        names = [entry.layer for entry in record.plan.layers]
        drawn = [names[place] for place in (0, 2, 3, 5, 6, 8)]
        for axis, name in zip(figures.spectra(record).axes, drawn, strict=True):
            entry, spectrum = record.plan[name], record.spectra[name]
            size, (*lines, dot) = min(entry.d, entry.m), axis.get_lines()
            for line, drawn_values in zip(lines, (spectrum.weight, spectrum.projected), strict=True):
                values = np.array(drawn_values)
                expected = [(values[:k] ** 2).sum() / (values**2).sum() for k in range(size + 1)]
                np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
                np.testing.assert_allclose(line.get_xdata(), np.arange(size + 1) / size)
                assert line.get_ydata()[-1] == pytest.approx(1) and line.get_xdata()[-1] == 1
            assert (dot.get_xdata(), dot.get_ydata()) == ([entry.utilization], [1])
            assert axis.get_title() == f"{names.index(name) + 1} ({name})"
            assert [text.get_text() for text in axis.texts] == [f"rank {entry.weight_rank} → {entry.rank}"]

    def test_curves_stop_rising_at_the_utilized_rank(self, record):
        for axis, name in zip(figures.spectra(record, list(record.spectra)).axes, record.spectra, strict=True):
            energy, rank = axis.get_lines()[1].get_ydata(), record.plan[name].rank
            assert energy[rank] >= 0.9999 * (1 - 1e-5)
            assert rank == 1 or energy[rank - 1] < 0.9999 * (1 + 1e-5)

    def test_draws_the_layers_asked_for(self, record):
        names = list(record.spectra)
        titles = [axis.get_title() for axis in figures.spectra(record, names + names).axes]
        assert titles == 2 * [f"{number} ({name})" for number, name in enumerate(names, 1)]

    def test_of_an_unknown_layer(self, record):
        with pytest.raises(ValueError, match="features.99"):
            figures.spectra(record, ["features.99"])

    def test_table_says_what_the_record_holds(self, record):
        first, *others = record.plan.to_dict()["layers"]
        unused = altered(record, plan__layers=[first | dict(rank=0), *others])
        [row] = figures.spectra_table(unused).to_dict("records")
        assert row["MLU %"] == pytest.approx(100 * unused.plan.mlu)
        assert (row["least used layer"], row["d x m"]) == ("1 (features.0)", f"{first['d']} x {first['m']}")
        assert (row["its rank of W"], row["its rank of W'"]) == (first["weight_rank"], 0)
        assert row["rank = k_T"] == sum(layer["rank"] == layer["k_t"] for layer in others)
        assert (row["original %"], row["projected %"]) == (record.accuracy.original, record.accuracy.projected)


def test_evenly_spaced_takes_first_and_last():
    names = [str(number) for number in range(9)]
    assert figures.evenly_spaced(names, 5) == ["0", "2", "4", "6", "8"]
    assert figures.evenly_spaced(names, 2) == ["0", "8"]
    assert figures.evenly_spaced(names[:3], 5) == ["0", "1", "2"]


class TestEnergySweep:
    def test_stacks_the_record_s_rows_on_one_axis_of_energy(self, record):
        axes = np.array(figures.energy_sweep(record).axes).reshape(3, 2)
        for column, layer in zip(axes.T, ("features.8", "classifier"), strict=True):
            rows = [row for row in record.sweep if row.layer == layer]
            accuracy, norm, k_s = (axis.get_lines()[1] for axis in column)
            for line in (accuracy, norm, k_s):
                assert line.get_xdata().tolist() == [row.energy for row in rows]
            assert accuracy.get_ydata().tolist() == [row.correct / record.plan.correct for row in rows]
            assert norm.get_ydata().tolist() == [row.norm_difference for row in rows]
            assert k_s.get_ydata().tolist() == [row.k_s for row in rows]
            assert layer in column[0].get_title()
            assert str(record.plan[layer].d) in column[2].texts[0].get_text()

    def test_marks_the_paper_s_threshold_in_grey(self, record):
        for axis in figures.energy_sweep(record, ["classifier"]).axes:
            mark = axis.get_lines()[0]
            assert mark.get_xdata() == [0.8, 0.8] and len(set(to_rgb(mark.get_color()))) == 1

    def test_shows_every_point(self, record):
        rows = [replace(row, correct=2 * record.plan.correct) for row in record.sweep]  # a projection may help
        axis = figures.energy_sweep(replace(record, sweep=tuple(rows))).axes[0]
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] >= 2

    @pytest.mark.parametrize("layer", ["features.0", "features.99"])
    def test_of_a_layer_that_was_not_swept(self, record, layer):
        with pytest.raises(ValueError, match=layer):
            figures.energy_sweep(record, [layer])

    @pytest.mark.parametrize("layers", [None, ["features.8"]])
    def test_of_a_record_without_any(self, record, layers):
        with pytest.raises(ValueError, match="sweep"):
            figures.energy_sweep(replace(record, sweep=()), layers)

    def test_table_has_the_lowest_threshold_that_is_enough(self, record):
        correct, rows = record.plan.correct, [row for row in record.sweep if row.layer == "features.8"]
        lost = [5, 4, 2, 1, 0, *[0] * 9]  # one of 80 images is 1.25 points, the tolerance
        rows = [replace(row, correct=correct - images) for row, images in zip(rows, lost, strict=True)]
        found = figures.sweep_table(replace(record, sweep=tuple(rows))).loc["features.8"]
        expected = [60, rows[3].k_s, 144, 100 * rows[3].norm_difference, 100 * (correct - 1) / correct, 100]
        assert found.tolist() == pytest.approx(expected) and rows[5].energy == 0.8
        assert figures.sweep_table(replace(record, sweep=tuple(rows[6:])))["kept at 80 %"].isna().all()

    def test_table_where_none_is_enough(self, record):
        rows = tuple(replace(row, correct=0) for row in record.sweep)
        frame = figures.sweep_table(replace(record, sweep=rows))
        assert frame.index.tolist() == ["features.8", "classifier"] and frame["energy %"].isna().all()
        assert frame["kept at 80 %"].tolist() == [0, 0]
        assert figures.styled(frame, "sweep").to_html().count("–") == 8


class TestTable3:
    def test_puts_the_paper_above_what_was_measured(self, record):
        frame = figures.measured_table(
            3, [altered(record, experiment__dataset=name, latency=[]) for name in ("cifar10", "cifar100")]
        )
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
        accuracy, cost, plan = record.accuracy, record.cost, record.plan
        assert frame.loc[("cifar10", "vgg11", "measured")].tolist() == pytest.approx(
            [
                accuracy.original,
                100 * np.mean([entry.weight_rank / min(entry.d, entry.m) for entry in plan.layers]),
                100 * np.mean([entry.rank / min(entry.d, entry.m) for entry in plan.layers]),
                accuracy.projected,
                accuracy.finetuned,
                accuracy.finetuned - accuracy.original,
                cost.compact.params / cost.original.params,
                cost.compact.macs / cost.original.macs,
            ]
        )

    def test_takes_no_variant_for_a_seed(self, record):
        variant = again(record, variant="isolated", mode="isolated")
        assert figures.measured_table(3, [record, variant]).equals(figures.measured_table(3, [record]))

    def test_comes_in_the_papers_order_and_then_what_it_does_not_have(self, record):
        places = [("digits10", "vgg11"), ("cifar100", "vgg11"), ("cifar10", "resnet18"), ("cifar10", "vgg19")]
        frame = figures.measured_table(
            3, [altered(record, experiment__dataset=d, experiment__network=n) for d, n in places]
        )
        shown = list(dict.fromkeys(row[:2] for row in frame.index))
        printed = [row[:2] for row in paper.table3()[["dataset", "network"]].itertuples(index=False, name=None)]
        assert shown == sorted(places[1:], key=printed.index) + places[:1] and shown != places

    def test_of_what_the_paper_does_not_have_is_measured_only(self, record):
        assert figures.measured_table(3, [record]).index.tolist() == [("digits10", "vgg11", "measured")]

    def test_of_nothing_is_empty(self):
        frame = figures.measured_table(3, [])
        assert len(frame) == 0 and frame.columns.tolist() == LABELS

    def test_as_a_page_shows_it(self, record):
        shown = altered(
            record, experiment__dataset="cifar10", accuracy__original=91.234, accuracy__finetuned=91.0, latency=[]
        )
        html = figures.styled(figures.measured_table(3, [shown]), "table3").to_html()
        assert html == figures.styled(figures.measured_table(3, [shown]), "table3").to_html()  # no random identifier
        cells = [cell.split("<")[0] for cell in html.split('class="data')[1:]]
        cells = [cell.split(">")[-1] for cell in cells]
        assert cells[:8] == ["91.5", "98.0", "47.0", "–", "92.5", "+1.0", "0.34", "0.60"]
        measured = figures.measured_row(shown)
        assert cells[8:] == [
            "91.2", f"{measured['original_mlu']:.1f}", f"{measured['mlu']:.1f}",
            f"{shown.accuracy.projected:.1f}", "91.0", "-0.23",
            f"{shown.params_ratio:.2f}", f"{shown.macs_ratio:.2f}",
        ]  # fmt: skip

    def test_of_two_seeds_is_their_mean(self, record):
        seeds = [
            altered(record, experiment__dataset="cifar10", experiment__seed=s, accuracy__original=90.0 + s)
            for s in (0, 1)
        ]
        frame = figures.measured_table(3, seeds)
        assert frame.index.get_level_values("source").tolist() == ["paper", "measured, mean of 2"]
        assert frame["original %"].tolist() == [91.5, 90.5]

    def test_has_no_mean_over_fewer_seeds_than_it_says(self, record):
        timed, untimed = record, altered(again(record, seed=1), latency=[])
        assert "speed" in figures.measured_table(3, [timed]) and "speed" not in figures.measured_table(
            3, [timed, untimed]
        )

    def test_has_no_mean_over_what_differs_in_more_than_the_seed(self, record):
        longer = again(record, seed=1, train=recipe(record, "train", epochs=9))
        with pytest.raises(ValueError, match="digits10/vgg11-s1 and digits10/vgg11 share a row of a table"):
            figures.measured_table(3, [record, longer])
        starts = [again(record, seed=seed, start=f"digits100/vgg11{end}") for seed, end in ((0, ""), (1, "-s1"))]
        assert figures.measured_table(3, starts).index.tolist() == [("digits10", "vgg11", "measured, mean of 2")]

    def test_sizes_are_those_of_the_record(self, record):
        full = altered(record, experiment__dataset="cifar10", experiment__width=1, accuracy__baseline=77.0)
        [row] = figures.size_table([full]).to_dict("records")
        useful = sum(entry.rank * (entry.d + entry.m) < entry.d * entry.m for entry in record.plan.layers)
        assert (row["layers"], row["smaller as two"], row["epochs"]) == (9, useful, "4 + 2")
        assert row["params, M"] == record.cost.compact.params / 1e6
        assert row["MACs of original, M"] == record.cost.original.macs / 1e6
        assert row["split %"] == record.accuracy.decomposed
        assert row["fine-tuned − full rank"] == record.accuracy.finetuned - 77.0
        assert row["original − paper"] == record.accuracy.original - 91.5
        assert np.isnan(figures.size_table([record])["original − paper"].iloc[0])


@pytest.fixture(scope="module")
def several():
    """One record in many roles: a family, two data sets, other weights, other tolerances, a second seed."""
    record = altered(finished()[1], accuracy__baseline=None)

    def like(scale, weights="the plain network's", **settings):
        content = record.to_dict()
        layers = [layer | dict(rank=max(1, round(layer["rank"] * scale))) for layer in content["plan"]["layers"]]
        compact = {key: scale * count for key, count in content["cost"]["compact"].items()}
        accuracy = content["accuracy"] | dict(original=80 * scale, merged=70 * scale, finetuned=75 * scale)
        one = altered(record, weights=weights, plan__layers=layers, cost__compact=compact, accuracy=accuracy)
        return again(one, **settings)

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
        table = figures.measured_table(3, self.places(record))
        panels = figures.deviation(table).axes
        assert [axis.get_title(loc="left") for axis in panels] == ["MLU", "params", "MACs", "change"]
        shared = [("cifar10", "vgg11"), ("cifar100", "vgg19"), ("cifar100", "resnet18")]
        for axis, column in zip(panels, ("MLU %", "params", "MACs", "change"), strict=True):
            diagonal, *points = axis.get_lines()
            assert diagonal.get_slope() == 1
            expected = [
                (table.loc[(*place, "paper"), column], table.loc[(*place, "measured"), column]) for place in shared
            ]
            assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == expected
            assert [line.get_color() for line in points] == [figures.network_color(network) for _, network in shared]
            assert [line.get_markerfacecolor() for line in points][1:] == ["white", "white"]  # the second data set

    def test_names_points_data_sets_and_families(self, record):
        first, *others = figures.deviation(figures.measured_table(3, self.places(record))).axes
        marks = ["filled: CIFAR-10", "hollow: CIFAR-100", "VGG", "ResNet"]
        assert [text.get_text() for text in first.texts] == ["11", "19", "18", *marks]
        assert all([text.get_text() for text in axis.texts] == ["11", "19", "18"] for axis in others)

    def test_labels_keep_away_from_other_points(self, record):
        """Two networks with almost the same numbers: their labels are on different sides."""
        table = figures.measured_table(3, self.places(record)[:2])
        [one, other] = figures.deviation(table).axes[1].texts
        assert np.hypot(*np.subtract(one.get_position(), other.get_position())) > 0.1

    def test_joins_two_seeds_by_a_line(self, record):
        seeds = [altered(record, accuracy__finetuned=finetuned) for finetuned in (70.0, 73.0)]
        seeds = [altered(one, experiment__dataset="cifar10", experiment__seed=n) for n, one in enumerate(seeds)]
        table = figures.measured_table(3, seeds)
        change = figures.deviation(table, [seeds]).axes[3]
        [line] = [one.get_segments() for one in change.collections]
        original, printed = record.accuracy.original, table["change"].iloc[0]
        assert np.allclose(line, [[[printed, 70 - original], [printed, 73 - original]]])

    def test_of_networks_that_the_paper_does_not_have(self, record):
        panels = figures.deviation(figures.measured_table(3, [record])).axes
        assert [len(axis.get_lines()) for axis in panels] == [1, 1, 1, 1]


class TestOverChoice:
    def test_draws_the_tolerances_beside_the_paper_s(self, several):
        plain, loose, strict = several[0], several[6], several[7]
        figure = figures.over_choice(5, [strict, plain, loose], {"MLU %": "MLU (%)", "params": "kept"})
        for axis, column in zip(figure.axes, ("MLU %", "params"), strict=True):
            ours, theirs = axis.get_lines()
            assert sorted(ours.get_xdata()) == [0.5, 1.25, 5.0]
            found = figures.measured_table(5, [strict, plain, loose])[column].sort_index(level="tolerance")
            assert sorted(ours.get_ydata()) == sorted(found)
            assert sorted(theirs.get_xdata()) == [0.01, 0.05, 0.1, 0.5] and theirs.get_color() == GREY
        assert figure.axes[-1].get_xscale() == "log"

    def test_draws_the_weights_by_name(self, several):
        plain, probe = several[0], several[5]
        [axis] = figures.over_choice(4, [plain, probe], {"MLU %": "MLU (%)"}).axes
        ours, theirs = axis.get_lines()
        assert dict(zip(ours.get_xdata(), ours.get_ydata())) == pytest.approx(
            {"from scratch": 100 * plain.plan.mlu, "linear probe": 100 * probe.plan.mlu}
        )
        assert dict(zip(theirs.get_xdata(), theirs.get_ydata())) == {
            "from scratch": 35,
            "end to end": 57,
            "linear probe": 69,
        }


class TestParts:
    @pytest.fixture
    def vit(self, record):
        layers = record.plan.to_dict()["layers"][:4]
        names = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "norm"]
        return altered(record, plan__layers=[layer | dict(layer=name) for layer, name in zip(layers, names)])

    def test_are_the_utilizations_by_kind(self, vit):
        frame = figures.utilization_by_part([vit])
        assert frame["part"].tolist() == ["patches", "QKV", "QKV"] and set(frame["weights"]) == {"from scratch"}
        expected = [100 * entry.utilization for entry in vit.plan.layers[:3]]
        assert frame["utilization %"].tolist() == expected
        [axis] = figures.parts([vit]).axes
        patches, _, blocks, mean = axis.get_lines()
        assert patches.get_xdata().tolist() == expected[:1] and blocks.get_xdata().tolist() == expected[1:]
        assert mean.get_xdata() == [np.mean(expected[1:])]
        assert [tick.get_text() for tick in axis.get_yticklabels()] == ["patches", "QKV"]


class TestSpeedup:
    def test_of_each_device_precision_and_batch(self, record):
        rows = [timed("original", 100.0), timed("compact", 150.0), timed("original", 40.0, batch=1)]
        rows += [
            timed("compact", 30.0, batch=1),
            timed("original", 9.0, device="b"),
            timed("compact", 18.0, device="b"),
        ]
        table = figures.speed_table([altered(record, latency=rows)])
        assert table.columns.tolist() == ["float32, batch 1", "float32, batch 256"]
        assert table.index.tolist() == [("digits10", "vgg11", "a"), ("digits10", "vgg11", "b")]
        assert table.iloc[0].tolist() == [0.75, 1.5] and np.isnan(table.iloc[1, 0]) and table.iloc[1, 1] == 2.0
        assert figures.faster_counts(table).to_numpy().tolist() == [[0, 2], [1, 2]]

    def test_throughputs_are_those_of_the_record(self, record):
        rows = [timed("original", 100.0), timed("compact", 150.0), timed("original", 9.0, device="b")]
        frame = figures.throughput_table([altered(record, latency=rows)])
        assert frame.columns.tolist() == ["original, images/s", "compact, images/s"]
        assert frame.loc[("digits10/vgg11", "a", "float32", 256)].tolist() == [100, 150]

    def test_of_several_seeds_is_the_mean(self, record):
        runs = [
            altered(record, experiment__seed=seed, latency=[timed("original", 10.0), timed("compact", compact)])
            for seed, compact in ((0, 10.0), (1, 20.0))
        ]
        variant = altered(again(runs[1], variant="shorter"), latency=[timed("original", 1.0), timed("compact", 9.0)])
        assert figures.speed_table([*runs, variant]).to_numpy().tolist() == [[1.5]]
        assert figures.speed_table([variant]).empty

    def test_bfloat16_comes_last(self, record):
        rows = [timed(name, 1.0, precision=precision) for precision in PRECISIONS for name in ("original", "compact")]
        table = figures.speed_table([altered(record, latency=rows)])
        assert table.columns.tolist() == ["float32, batch 256", "bfloat16, batch 256"]


PRECISIONS = ("bfloat16", "float32")


def timed(network, speed, batch=256, device="a", precision="float32"):
    return dict(network=network, images_per_second=speed, batch=batch, device=device, precision=precision)


class TestContrasts:
    def test_choose_what_differs_in_one_thing(self, several):
        plain, _, vgg19, _, harder, probe, loose, strict = several
        assert figures.differing_in_size(several) == [[plain, vgg19]]
        assert figures.differing_in_dataset(several) == [[plain, harder]]
        assert figures.differing_in_weights(several) == [[plain, probe]]
        assert figures.differing_in_tolerance(several) == [[strict, plain, loose]]

    def test_tell_other_weights_from_another_search(self, several):
        """A network that saw fewer images, or was searched otherwise, came to its weights as the plain one did."""
        plain, probe = several[0], several[5]
        library = dict(network="torchvision/vit_b_16", width=1)
        plain, probe = again(plain, **library), again(probe, **library, start="cifar100/vit_b_16")
        taken = dict(train=recipe(plain, "train", epochs=0), start="cifar10/vit_b_16")
        held_out = altered(again(plain, variant="held-out", holdout=5000), weights="of held-out")
        isolated = again(plain, variant="isolated", mode="isolated", **taken)
        tag = "IMAGENET1K_SWAG_E2E_V1"
        published = altered(again(plain, variant="swag", pretrained=tag, train=taken["train"]), weights="published")
        looser = again(published, variant="swag-eps", tolerance=9.0)
        thinner = altered(again(probe, variant="thin", width=0.5), weights="of the thin one")
        few = again(plain, variant="few", validation=7, tolerance=9.0, **taken)
        records = [plain, held_out, isolated, probe, published, looser, thinner, few]
        assert figures.differing_in_weights(records) == [[plain, probe, published]]
        assert figures.differing_in_tolerance(records) == []

    def test_keep_to_one_seed(self, several):
        plain, other, *_, strict = several
        strict_of_other = altered(again(strict, seed=1), weights=other.weights)
        assert figures.differing_in_tolerance([plain, other, strict_of_other]) == [[strict_of_other, other]]
        isolated = again(strict_of_other, tolerance=plain.plan.tolerance, mode="isolated")
        assert figures.differing_in_search([plain, other, isolated]) == [[other, isolated]]
        both = [plain, again(plain, variant="x", mode="isolated"), isolated, other]
        assert figures.differing_in_search(both) == [both[:2]]

    def test_labels_say_all_that_differs(self, several):
        plain, seed_1, vgg19, resnet, harder, probe, *_ = several
        records = [plain, vgg19, resnet, harder]
        table = figures.measured_points(records)
        assert table["label"].tolist() == ["vgg11, cifar10", "vgg19, cifar10", "resnet18, cifar10", "vgg11, cifar100"]
        assert figures.measured_points([plain, seed_1])["label"].tolist() == ["seed 0", "seed 1"]
        end_to_end = altered(again(probe, variant="end-to-end"), weights="of all")
        assert figures.measured_points([probe, end_to_end])["label"].tolist() == ["linear probe", "end to end"]

    def test_show_every_plain_record_once_or_more(self, several):
        plain, _, vgg19, resnet, harder, probe, loose, strict = several
        assert list(figures.figure2_panels(several).values()) == [[[plain, vgg19]], [[plain, harder]], [[plain, probe]]]
        harder_19 = again(harder, network="vgg19")
        assert figures.differing_in_size([*several, harder_19]) == [[plain, vgg19], [harder, harder_19]]
        assert figures.differing_in_dataset([*several, harder_19]) == [[plain, harder], [vgg19, harder_19]]
        assert figures.in_no_panel(several) == [resnet]
        assert figures.in_no_panel([plain, loose]) == [plain]

    def test_take_the_lowest_seed_whatever_the_order(self, several):
        plain, _, vgg19, *_ = several
        assert figures.differing_in_size(several[::-1]) == [[vgg19, plain]]


class TestProtocol:
    @pytest.fixture
    def ways(self, several):
        plain = several[0]
        taken = dict(train=recipe(plain, "train", epochs=0), start="cifar10/vgg11")
        isolated = again(plain, variant="isolated", mode="isolated", **taken)
        backward = altered(again(plain, variant="backward", order="backward", **taken), calibration_images=2000)
        least = [entry | dict(rank=1) for entry in plain.plan.to_dict()["layers"]]
        few = altered(again(plain, variant="few", validation=7, **taken), plan__layers=least, accuracy__projected=5.0)
        return [plain, altered(isolated, plan__mode="isolated"), backward, few]

    def test_chooses_searches_of_one_network(self, several, ways):
        assert figures.differing_in_search([*ways[::-1], *several[1:]]) == [[ways[0], ways[3], *ways[2:0:-1]]]

    def test_compares_held_out_with_test_images_on_one_network(self, ways):
        plain, *_ = ways
        held_out = altered(again(plain, variant="held-out", holdout=5000), weights="of held-out")
        on_test = again(plain, variant="on-test", start="cifar10/vgg11@held-out", train=recipe(ways[1], "train"))
        on_test = altered(on_test, weights="of held-out")
        groups = figures.differing_in_search([held_out, *ways, on_test])
        assert groups[0] == [on_test, held_out] and len(groups) == 2
        assert figures.search_table(groups[0]).index.tolist() == ["on test images", "on 5,000 held-out images"]
        full = [altered(one, experiment__dataset="cifar10", experiment__width=1) for one in groups[0]]
        assert "paper" not in figures.search_table(full).index  # its network saw all training images
        assert figures.differing_in_search([held_out, plain]) == []

    def test_takes_another_network_for_none_of_its_searches(self, ways):
        plain, isolated, *_ = ways
        assert figures.differing_in_search([plain, altered(isolated, weights="others")]) == []

    def test_shows_a_search_once_however_often_it_was_fine_tuned(self, ways):
        plain, isolated, *_ = ways
        longer = again(plain, variant="longer", finetune=recipe(plain, "finetune", epochs=9))
        assert figures.differing_in_search([longer, plain]) == []
        assert figures.differing_in_search([longer, isolated, plain]) == [[plain, isolated]]

    def test_ways_of_one_name_are_two_rows(self, ways):
        assert len(figures.search_table([*ways, ways[1]])) == 5

    def test_table_compares_with_the_first(self, ways):
        frame, plain = figures.search_table(ways), ways[0]
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

    def test_table_ends_with_what_the_paper_prints(self, ways):
        full = [altered(way, experiment__width=1) for way in ways]
        frame = figures.search_table(full)
        assert frame.loc["paper", ["original %", "MLU %", "params"]].tolist() == [91.5, 47, 0.34]
        assert frame.loc["paper", ["may lose", "lost, test"]].isna().all()
        assert frame["may lose"].iloc[0] == pytest.approx(2 * 9 * 1.25)
        html = figures.styled(frame, "search", figures.EXACT).to_html()
        assert ">91.5<" in html and ">80.00<" in html  # the paper prints fewer decimals

    def test_snapshot_names_the_ways(self, ways):
        panels = figures.snapshot(ways).axes
        assert "backward" in panels[2].get_title(loc="left")


class TestFinetuning:
    @pytest.fixture
    def ways(self, several):
        plain = altered(several[0], accuracy__baseline=79.5)
        taken = dict(train=recipe(plain, "train", epochs=0), start="cifar10/vgg11")
        longer = again(plain, variant="longer", finetune=recipe(plain, "finetune", epochs=11), **taken)
        return [plain, altered(longer, accuracy__finetuned=81.5, accuracy__baseline=81.75)]

    def test_chooses_one_network_split_once(self, several, ways):
        plain, longer = ways
        assert figures.differing_in_finetuning([longer, plain, *several[1:]]) == [[plain, longer]]
        least = [entry | dict(rank=1) for entry in plain.plan.to_dict()["layers"]]
        not_at_all = again(longer, finetune=recipe(longer, "finetune", epochs=0))
        faster = again(plain, variant="x", finetune=recipe(plain, "finetune", capture=True))
        for other in (altered(longer, weights="others"), altered(longer, plan__layers=least), not_at_all, faster):
            assert figures.differing_in_finetuning([plain, other]) == []

    def test_keeps_to_one_seed(self, several, ways):
        _, seed_1, *_ = several
        longer_of_1 = altered(again(ways[1], seed=1), weights=seed_1.weights)
        assert figures.differing_in_finetuning([longer_of_1, seed_1, *ways]) == [ways]
        assert figures.differing_in_finetuning([longer_of_1, seed_1, ways[0]]) == [[seed_1, longer_of_1]]

    def test_table_counts_from_the_original(self, ways):
        frame = figures.recipe_table([altered(way, experiment__width=1) for way in ways], "finetune")
        assert frame.index.tolist() == [2, 11, "paper"] and frame["learning rate"].tolist()[:2] == [0.01, 0.01]
        columns = ["fine-tuned %", "change", "full rank %", "full rank, change", "fine-tuned − full rank"]
        assert frame[columns].iloc[1].tolist() == [81.5, 1.5, 81.75, 1.75, -0.25]
        assert frame.loc["paper", "change"] == 1.0

    def test_table_without_a_full_rank_network(self, ways):
        frame = figures.recipe_table([altered(way, accuracy__baseline=None) for way in ways], "finetune")
        assert not [name for name in frame.columns if "full rank" in name] and "paper" not in frame.index


class TestTraining:
    @pytest.fixture
    def ways(self, several):
        plain = several[0]
        longer = altered(again(plain, train=recipe(plain, "train", epochs=40)), weights="of 40 epochs")
        shorter = again(plain, variant="trained-shorter")
        return [altered(shorter, accuracy__original=70.0, accuracy__finetuned=72.0), longer]

    def test_chooses_one_network_trained_otherwise_and_searched_alike(self, several, ways):
        shorter, longer = ways
        assert figures.differing_in_training([longer, shorter, *several[1:]]) == [ways]
        taken = again(shorter, start="cifar10/vgg11")
        searched = again(shorter, mode="isolated")
        thin = again(shorter, width=0.5)
        same = altered(again(longer, variant="x"), weights="of another machine")
        captured = again(same, train=recipe(same, "train", capture=True))
        tuned = again(longer, variant="x", train=recipe(longer, "train", epochs=0), start="cifar10/vgg11")
        for other in (taken, searched, thin, same, captured, tuned):
            assert figures.differing_in_training([longer, other]) == []
        assert figures.differing_in_training(several) == []

    def test_table_has_a_row_a_way(self, ways):
        frame = figures.recipe_table(ways, "train")
        assert frame.index.tolist() == [4, 40] and frame["learning rate"].tolist() == [0.03, 0.03]
        assert frame["original %"].tolist() == [70.0, 80.0] and frame["change"].tolist() == [2.0, -5.0]


class TestRepetition:
    @pytest.fixture
    def seeds(self, several):
        measured = dict(accuracy__original=82.0, accuracy__finetuned=75.5, accuracy__baseline=77.0)
        return [altered(several[0], accuracy__baseline=77.5), altered(several[1], **measured)]

    def test_chooses_plain_networks_of_several_seeds(self, several, seeds):
        first, second = seeds
        assert figures.differing_in_seed([second, *several[2:], first]) == [[first, second]]
        assert figures.differing_in_seed([first, again(second, variant="longer"), *several[2:]]) == []

    def test_table_of_two_ends_with_their_mean(self, seeds):
        frame = figures.seed_table(seeds)
        assert frame.index.tolist() == [0, 1, "mean"] and frame.index.name == "seed"
        assert frame["original %"].tolist() == pytest.approx([80, 82, 81])
        assert frame["change"].tolist() == pytest.approx([-5, -6.5, -5.75])

    def test_has_no_mean_where_a_seed_lacks_a_number(self, seeds):
        frame = figures.seed_table([altered(seeds[0], accuracy__baseline=None), seeds[1]])
        assert frame["full rank %"].isna().tolist() == [True, False, True]

    def test_table_compares_with_the_full_rank_network_and_the_paper(self, seeds):
        frame = figures.seed_table([altered(one, experiment__width=1) for one in seeds])
        assert frame["fine-tuned − full rank"].tolist()[:3] == pytest.approx([-2.5, -1.5, -2])
        assert frame.loc["paper", "change"] == 1.0


class TestSnapshot:
    def test_draws_the_ranks_of_every_layer(self, several):
        [chosen] = figures.differing_in_size(several)
        figure = figures.snapshot(chosen, "a title")
        assert figure.get_suptitle() == "a title"
        for axis, record, name in zip(figure.axes, chosen, ("VGG11 on CIFAR-10", "VGG19 on CIFAR-10"), strict=True):
            (dotted, solid), layers = axis.get_lines(), record.plan.layers
            assert dotted.get_ydata().tolist() == [entry.weight_rank for entry in layers]
            assert solid.get_ydata().tolist() == [entry.rank for entry in layers]
            assert dotted.get_xdata().tolist() == solid.get_xdata().tolist() == list(range(1, 10))
            assert (dotted.get_linestyle(), solid.get_linestyle()) == (":", "-")
            assert dotted.get_color() == solid.get_color()
            ends = record.cost.original.params, record.cost.compact.params
            before, after = (f"{count / 1e6:.{3 if count < 1e5 else 2}f} M" for count in ends)
            accuracy = record.accuracy
            expected = f"{before} → {after}, {accuracy.original:.1f} → {accuracy.merged:.1f} %"
            assert axis.get_title(loc="left") == f"{name}\n{expected}"

    def test_shows_the_largest_rank_of_all_networks(self, several):
        [chosen] = figures.differing_in_size(several)
        figure = figures.snapshot(chosen[::-1])
        largest = max(entry.weight_rank for record in chosen for entry in record.plan.layers)
        assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] >= largest for axis in figure.axes)

    def test_compares_accuracies_of_one_stage(self, several):
        [[tuned, other]] = figures.differing_in_size(several)
        other = altered(other, experiment__finetune=recipe(other, "finetune", epochs=0))
        figure = figures.snapshot([tuned, other])
        assert tuned.accuracy.decomposed != tuned.accuracy.merged
        assert figure.axes[0].get_title(loc="left").endswith(f" → {tuned.accuracy.decomposed:.1f} %")
        assert "before fine-tuning" in figure.get_supxlabel()
        assert "before fine-tuning" not in figures.snapshot([tuned]).get_supxlabel()

    @pytest.mark.parametrize(
        "choose, names",
        [
            (figures.differing_in_dataset, ["VGG11 on CIFAR-10", "VGG11 on CIFAR-100"]),
            (figures.differing_in_weights, ["VGG11 on CIFAR-10, from scratch", "VGG11 on CIFAR-10, linear probe"]),
            (figures.differing_in_tolerance, [f"VGG11 on CIFAR-10, $\\epsilon$ = {e}" for e in ("0.5", "1.25", "5")]),
        ],
    )
    def test_names_what_differs(self, several, choose, names):
        panels = figures.snapshot(choose(several)[0]).axes
        assert [panel.get_title(loc="left").split("\n")[0] for panel in panels] == names

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one record"):
            figures.snapshot([])

    def test_table_names_the_peak_and_compares_the_mlu(self, several):
        [chosen] = figures.differing_in_dataset(several)
        frame = figures.peak_table(chosen)
        for record, row in zip(chosen, frame.to_dict("records"), strict=True):
            ranks = [entry.rank for entry in record.plan.layers]
            assert (row["layers"], row["peak"], row["rank"]) == (9, str(1 + ranks.index(max(ranks))), max(ranks))
        shares = [100 * record.plan.mlu for record in chosen]
        assert frame["MLU − largest"].tolist() == pytest.approx([0, shares[1] - shares[0]])
        assert frame.index.tolist() == ["cifar10", "cifar100"] and "paper's MLU %" not in frame

    def test_table_compares_with_the_paper(self, several):
        easy, hard = (altered(one, experiment__width=1) for one in figures.differing_in_dataset(several)[0])
        frame = figures.peak_table([easy, altered(hard, experiment__train=recipe(hard, "train", epochs=30))])
        assert frame["paper's MLU %"].tolist() == [47, 64]
        assert frame["paper's MLU − largest"].tolist() == [0, 17]  # cifar10 has the larger MLU here
        assert frame["epochs of training"].tolist() == [4, 30]

    def test_table_names_all_layers_of_the_largest_rank(self, record):
        layers = record.plan.to_dict()["layers"]
        layers = [layer | dict(rank=16 if number in (4, 5) else 1) for number, layer in enumerate(layers, 1)]
        [row] = figures.peak_table([altered(record, plan__layers=layers)]).to_dict("records")
        first, second = (min(layer["d"], layer["m"]) for layer in layers[3:5])
        assert (row["peak"], row["rank"], row["of"]) == ("4, 5", 16, f"{first}, {second}")


class TestTradeoff:
    def bubbles(self, figure):
        return [(*circle.get_offsets()[0], circle.get_sizes()[0]) for circle in figure.axes[0].collections]

    @pytest.mark.parametrize(
        "smallest, largest", [(0.47, 0.59), (0.2, 9.2), (0.0051, 0.0052), (0.004, 0.15), (0.002, 90)]
    )
    def test_numbers_the_axis_of_parameters_at_three_to_seven_places(self, smallest, largest):
        row = dict(original_macs=1, compact_macs=1, original_top1=90, compact_top1=89, label="a network", network="vit")
        points = pd.DataFrame([row | dict(original_params=1e6 * largest, compact_params=1e6 * smallest)])
        axis = figures.tradeoff(points).axes[0]
        low, high = axis.get_xlim()
        shown = [float(tick.get_text()) for tick in axis.get_xticklabels()]
        assert 3 <= len(shown) <= 7 and all(low <= number <= high for number in shown)

    def test_draws_before_and_after_with_the_area_of_the_macs(self, several):
        [chosen] = figures.differing_in_size(several)
        figure = figures.tradeoff(figures.measured_points(chosen))
        expected = [
            (cost.params / 1e6, accuracy, 900 * cost.macs / chosen[0].cost.original.macs)
            for record in chosen
            for cost, accuracy in (
                (record.cost.original, record.accuracy.original),
                (record.cost.compact, record.accuracy.merged),
            )
        ]
        np.testing.assert_allclose(self.bubbles(figure), expected)
        arrows = [text for text in figure.axes[0].texts if text.arrow_patch is not None]
        assert [(*arrow.xyann, *arrow.xy) for arrow in arrows] == [
            pytest.approx((*start[:2], *end[:2])) for start, end in zip(expected[::2], expected[1::2])
        ]

    def test_takes_the_data_sets_apart(self, several):
        plain = figures.base_records(several)
        groups = figures.by_dataset(figures.measured_points(plain))
        assert len(groups) > 1 and sum(map(len, groups.values())) == len(plain)
        for dataset, points in groups.items():
            assert points["label"].tolist() == [name for data, name in map(place, plain) if data == dataset]
            assert points.index.tolist() == list(range(len(points)))

    def test_draws_the_paper_s_rows_of_the_same_networks_in_grey(self, several):
        points = figures.measured_points(figures.differing_in_size(several)[0])
        printed = figures.printed_for(points, paper.tradeoff(paper.table3()))
        assert list(zip(printed["network"], printed["dataset"])) == [("vgg11", "cifar10"), ("vgg19", "cifar10")]
        axis = figures.tradeoff(points, printed).axes[0]
        grey = [circle for circle in axis.collections if len(set(circle.get_edgecolor()[0][:3])) == 1]
        assert [circle.get_offsets()[0][1] for circle in grey] == [91.5, 92.5, 92.7, 93.6]
        assert len(axis.collections) == 8

    def test_names_each_network_beside_its_arrow(self, several):
        points = figures.measured_points(figures.differing_in_size(several)[0])
        axis = figures.tradeoff(points).axes[0]
        named = [text for text in axis.texts if text.get_text().startswith("VGG")]
        assert [text.get_text() for text in named] == ["VGG11", "VGG19"]
        assert [text.xy for text in named] == list(zip(points["compact_params"] / 1e6, points["compact_top1"]))

    def test_of_networks_that_the_paper_does_not_have(self, record):
        assert figures.printed_for(figures.measured_points([record]), paper.tradeoff(paper.table3())) is None

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one network"):
            figures.tradeoff(pd.DataFrame())

    def test_has_room_for_the_names(self, several):
        figure = figures.tradeoff(figures.measured_points(figures.differing_in_size(several)[0]))
        figure.draw_without_rendering()
        [axis] = figure.axes
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text().startswith("VGG")]
        assert len(boxes) == 2 and all(box.x0 >= axis.get_window_extent().x0 for box in boxes)

    def test_table_says_what_the_arrows_show(self, several):
        points = figures.measured_points(figures.differing_in_size(several)[0])
        frame = figures.change_table(points)
        assert frame.index.tolist() == ["vgg11", "vgg19"]
        assert frame["params"].tolist() == (points["compact_params"] / points["original_params"]).tolist()
        assert frame["change"].tolist() == pytest.approx([-10, -9])
        printed = figures.printed_for(points, paper.tradeoff(paper.table3()))
        assert figures.change_table(points, printed[::-1])["paper's change"].tolist() == pytest.approx([1.0, 0.9])


class TestOtherTables:
    def test_table4_names_how_the_weights_came_about(self, several):
        frame = figures.measured_table(4, figures.differing_in_weights(several)[0])
        assert frame.index.get_level_values("weights").tolist() == ["from scratch", "linear probe"]
        assert frame["original %"].tolist() == pytest.approx([80, 48])

    def test_table5_goes_by_tolerance(self, several):
        [chosen] = figures.differing_in_tolerance(several)
        frame = figures.measured_table(5, chosen)
        assert frame.index.get_level_values("tolerance").tolist() == [0.5, 1.25, 5.0]
        assert frame["MLU %"].tolist() == pytest.approx([100 * record.plan.mlu for record in chosen])
        html = figures.styled(frame, "table5").to_html()
        assert all(f">{tolerance}<" in html for tolerance in ("0.5", "1.25", "5"))

    def test_tables_write_epsilon_as_a_letter(self, several):
        points = figures.measured_points(figures.differing_in_tolerance(several)[0])
        html = figures.styled(figures.change_table(points), "changes").to_html()
        assert "ε = 0.5<" in html and "epsilon" not in html

    def test_tables_put_the_paper_above(self, record):
        vit = dict(experiment__network="torchvision/vit_b_16", experiment__dataset="imagenet-1k")
        sources = lambda frame: frame.index.get_level_values("source").tolist()  # noqa: E731
        assert sources(figures.measured_table(1, [altered(record, **vit)])) == ["paper", "measured"]
        assert (
            sources(figures.measured_table(4, [altered(record, **vit, experiment__variant="end-to-end")]))[0] == "paper"
        )
        table5 = figures.measured_table(5, [altered(record, **vit, experiment__tolerance=0.05)])
        assert table5.loc[("imagenet-1k", "torchvision/vit_b_16", 0.05, "paper"), "MLU %"] == 38.7

    def test_speed_is_shown_where_it_was_timed(self, record):
        row = dict(device="one", precision="float32", batch=256)
        latency = [
            row | dict(network="original", images_per_second=100.0),
            row | dict(network="compact", images_per_second=150.0),
            row | dict(network="original", images_per_second=900.0, precision="bfloat16"),
            row | dict(network="compact", images_per_second=900.0, precision="bfloat16"),
        ]
        assert figures.measured_table(3, [altered(record, latency=latency)])["speed"].tolist() == [1.5]
        assert "speed" not in figures.measured_table(3, [altered(record, latency=[])])

    def test_full_rank_baseline_is_shown_where_it_was_run(self, record):
        assert "full rank %" not in figures.measured_table(3, [record])
        frame = figures.measured_table(3, [altered(record, accuracy__baseline=77.0)])
        assert frame["full rank %"].tolist() == [77.0]

    @pytest.mark.parametrize("number, rows", [(1, 16), (3, 14), (4, 3), (5, 4)])
    def test_the_paper_s_own(self, number, rows):
        html = figures.styled(figures.printed_table(number), "printed").to_html()
        assert html.count("<tr>") == 2 + rows and "nan" not in html
        assert number != 3 or "+2.1" in html

    def test_captions_name_the_records(self, several):
        text = figures.caption("What is drawn.", several[:2], "The one thing to see.")
        assert text == "*What is drawn.* Records: `cifar10/vgg11`, `cifar10/vgg11-s1`. The one thing to see."
        assert figures.caption("What is drawn.", several[:1]) == "*What is drawn.* Record: `cifar10/vgg11`."


class TestTable2:
    def test_marks_the_impossible_alone(self):
        html = figures.printed_table2().to_html()
        assert html.count("(not legible)") == 2 and html.count("#f6d5d0") == 1
        [rule] = [line for line in html.replace("{", "\n{").split("\n") if "#T_table2-printed_row" in line][:1]
        assert rule.count("#T_table2-printed_row") == 1

    def test_recipes_are_those_that_run(self, record):
        experiments = {"digits10/vgg11": record.experiment}
        frame, shared = figures.recipe_fields(experiments), figures.shared_fields(experiments)
        assert frame.index.tolist() == [("digits10/vgg11", "train"), ("digits10/vgg11", "finetune")]
        for fit in ("train", "finetune"):
            row, chosen = frame.loc[("digits10/vgg11", fit)], getattr(record.experiment, fit)
            assert (row["epochs"], row["lr"]) == (str(chosen.epochs), f"{chosen.lr:g}")
        train, finetune = (vars(getattr(record.experiment, fit)) for fit in ("train", "finetune"))
        same = [name for name in train if train[name] == finetune[name]]
        assert shared.columns.tolist() == same and "momentum" in same and "lr" not in same
        assert frame.columns.tolist() == [name.replace("_", " ") for name in train if name not in same]
        assert shared["momentum"].tolist() == ["0.9"]

    def test_one_recipe_is_shown_whole(self, record):
        taken = {"taken": replace(record.experiment, train=Recipe(epochs=0))}
        assert "momentum" in figures.recipe_fields(taken) and figures.shared_fields(taken).columns.empty

    def test_recipes_leave_out_fits_that_are_not_run(self, record):
        taken = replace(record.experiment, train=Recipe(epochs=0))
        assert figures.recipe_fields({"taken": taken}).index.tolist() == [("taken", "finetune")]
        neither = {"neither": replace(taken, finetune=taken.train)}
        assert figures.recipe_fields(neither).empty and figures.shared_fields(neither).empty

    def test_prepared_recipes_have_the_printed_values(self):
        """Each value of the profile is one of the printed grid, and the epochs are the printed ones."""
        prepared = figures.prepared_recipes(load_profile("imagenet").experiments)
        printed = paper.table2()[list(prepared)]
        names = {"Batch Size": "batch size", "Epochs": "epochs", "Learning Rate": "lr", "Weight Decay": "weight decay"}
        for row, field in names.items():
            for column in prepared:
                assert float(prepared.loc[field, column]) in figures.numbers(printed.loc[row, column])
        transformers, resnets = (prepared[column] for column in prepared)
        assert float(transformers["ema decay"]) in figures.numbers(printed.iloc[:, 0]["EMA Decay"])
        assert (transformers["optimizer"], resnets["optimizer"], resnets["ema decay"]) == ("adamw", "sgd", "none")

    def test_several_prepared_recipes_of_one_column_are_named_by_experiments(self):
        experiments = load_profile("imagenet").experiments
        first, name = "imagenet-1k/torchvision/vit_b_32", "imagenet-1k/timm/deit_tiny_patch16_224"
        other = replace(experiments[name], finetune=replace(experiments[name].finetune, mixup=0.8))
        prepared = figures.prepared_recipes(experiments | {name: other})
        assert list(prepared) == [first, name, "ResNets, ImageNet"]
        assert prepared.loc["mixup"].tolist() == ["0.2", "0.8", "0"]

    def test_other_data_sets_prepare_nothing(self, record):
        assert figures.prepared_recipes({"digits10/vgg11": record.experiment}).empty


def test_runs_are_one_line_each(several):
    frame = figures.run_table(several[:2] + several[5:], "runs").data
    assert frame.index.tolist() == [
        "cifar10/vgg11",
        "cifar10/vgg11-s1",
        *(f"cifar10/vgg11@{v}" for v in ("linear-probe", "eps5", "eps0.5")),
    ]
    assert frame["tolerance"].tolist() == ["1.25", "1.25", "1.25", "5", "0.5"]


def test_details_name_the_run(record):
    values = figures.run_details(record).data.iloc[:, 0]
    assert values["network"] == "vgg11, width 0.125" and values["data set"] == "digits10" and values["seed"] == 0
    assert (values["epochs of training"], values["epochs of fine-tuning"]) == (4, 2)
    assert (values["tolerance"], values["search"]) == ("1.25 points", "joint, forward")
    assert values["search images"] == "80 test images" and values["calibration images"] == 150
    assert values["date"] == record.made["finetune"]["date"]
    assert values["device"] == record.made["train"]["device"]
    assert values["precision of training"] == "float32"
    assert f"torch {record.versions['torch']}" in values["versions"] and "train " in values["seconds"]


def test_precision_that_is_not_recorded_is_not_guessed(record):
    first, *rest = record.history["train"]
    older = {name: value for name, value in first.items() if name != "precision"}
    mixed = altered(record, history__train=[older, *rest])
    assert figures.run_details(mixed).data.iloc[:, 0]["precision of training"] == "float32, not recorded"
    unfitted = altered(record, history={"train": [], "finetune": [], "baseline": []})
    assert figures.run_details(unfitted).data.iloc[:, 0]["precision of training"] == "–"


def test_commits_say_whether_the_tree_was_clean(record):
    def commit(*made):
        stages = dict(zip(record.made, made))
        return figures.run_details(replace(record, made=record.made | stages)).data.iloc[:, 0]["commit"]

    stage = record.made["train"] | dict(commit="0123abc", clean=True)
    older = {name: value for name, value in stage.items() if name in ("device", "date", "code")}
    assert commit(*[older] * len(record.made)) == "not recorded"
    assert commit(*[stage] * len(record.made)) == "0123abc"
    assert commit(stage, *[stage | dict(clean=False)] * (len(record.made) - 1)) == "0123abc, 0123abc with changes"


def test_figures_do_not_restyle_the_reader_s(record):
    before = dict(plt.rcParams)
    figures.spectra(record)
    figures.energy_sweep(record)
    figures.snapshot([record])
    assert dict(plt.rcParams) == before
