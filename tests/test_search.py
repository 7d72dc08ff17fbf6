import copy
import math

import naive
import pytest
import torch
from conftest import NETWORKS, briefly_trained, in_batches, small_mlp, structured_images
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import urank.search.validation
from urank import datasets
from urank.calibration import accumulate_grams
from urank.deadline import OutOfTime
from urank.factorize import project_network
from urank.files import read_json
from urank.models import create
from urank.plan import allowed_loss
from urank.search.bisection import search_ranks
from urank.search.validation import Validation, growing_sizes, margins


def small_vit():
    return VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=4)


BUILDERS = NETWORKS | {"vit": (small_vit, 8)}
# Per network: strength of the pattern in the noise, training steps, images to calibrate on, images to validate on.
# Every layer sees more rows than it has inputs: which eigenvectors an empty space gets is nobody's business.
SIZES = {
    "cnn": (0.4, 40, 128, 150),
    "mlp": (0.25, 15, 400, 200),
    "residual": (0.4, 60, 64, 150),
    "vgg11": (0.2, 30, 200, 40),
    "vit": (0.6, 120, 64, 150),
}
CASES = [
    *[(name, mode, tolerance) for name in ("cnn", "mlp") for mode in ("joint", "isolated") for tolerance in (0, 1, 4)],
    *[("residual", mode, tolerance) for mode in ("joint", "isolated") for tolerance in (0.7, 5)],
    ("vgg11", "joint", 2.5),
    *[("vit", mode, tolerance) for mode in ("joint", "isolated") for tolerance in (0.7, 4)],
]


@pytest.fixture(scope="module", autouse=True)
def reference_in_time():
    """The reference decomposes the same matrices in every probe: keep the answers."""
    answers, eigh = {}, naive.np.linalg.eigh

    def remember(matrix):
        key = matrix.tobytes()
        if key not in answers:
            answers[key] = eigh(matrix)
        return answers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive.np.linalg, "eigh", remember)
        yield


@pytest.fixture(scope="module")
def trained():
    """(network, calibration, validation) by name, trained once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            (build, size), (signal, steps, calibration, validation) = BUILDERS[name], SIZES[name]
            network = briefly_trained(build(), size, signal, steps)
            made[name] = (
                network,
                in_batches(*structured_images(calibration, size, signal, seed=2), 64),
                in_batches(*structured_images(validation, size, signal, seed=3), 64),
            )
        return made[name]

    return make


def search(network, calibration, validation, **options):
    grams = accumulate_grams(network, calibration, progress=False)
    return search_ranks(network, grams, validation, progress=False, **options)


def assert_equal_to_reference(plan, rows, probes, mlu, evaluation="exact"):
    """Where images may be presumed to stay right, a passing probe may count too many, but not the last of a layer."""
    assert plan.to_frame().to_dict("records") == rows
    assert [(p.layer, p.side, p.k, p.passed) for p in plan.probes] == [probe[:4] for probe in probes]
    for probe, (*_, correct) in zip(plan.probes, probes, strict=True):
        assert (probe.correct is None) == (not probe.passed)
        if probe.passed:
            assert probe.correct == correct or evaluation != "exact" and probe.correct > correct
    assert plan.mlu == pytest.approx(mlu)


@pytest.mark.parametrize(("name", "mode", "tolerance"), CASES)
def test_is_the_literal_search(trained, name, mode, tolerance):
    network, calibration, validation = trained(name)
    reference = naive.search(network, naive.grams(network, calibration), validation, tolerance, mode)
    for evaluation in ("exact", "fast"):
        plan = search(network, calibration, validation, mode=mode, tolerance=tolerance, evaluation=evaluation)
        assert_equal_to_reference(plan, *reference, evaluation)
        assert (plan.mode, plan.tolerance) == (mode, tolerance)
        assert plan.total == sum(len(labels) for _, labels in validation)
        assert plan.correct == naive.count_correct(network, validation)


@pytest.mark.parametrize(("name", "budget"), [("cnn", 4), ("mlp", 10), ("residual", 9), ("vit", 8)])
def test_a_budget_for_the_whole_network_is_kept(trained, name, budget):
    """Equal to a naive search. After i of n projections, at most floor(i/n budget N / 100) images are lost."""
    network, calibration, validation = trained(name)
    reference = naive.search(network, naive.grams(network, calibration), validation, None, budget=budget)
    for evaluation in ("exact", "fast"):
        plan = search(network, calibration, validation, budget=budget, evaluation=evaluation)
        assert_equal_to_reference(plan, *reference, evaluation)
        assert (plan.tolerance, plan.budget) == (None, budget)
        for number, layer in enumerate(plan.layers, 1):
            assert plan.correct - layer.correct <= math.floor(number * budget * plan.total / (100 * len(plan.layers)))
    equal = search(network, calibration, validation, tolerance=budget / (2 * len(plan.layers)), evaluation="exact")
    assert plan.mlu <= equal.mlu  # what one projection does not use, others do


@pytest.mark.parametrize("sides", ["input", "output"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("cnn", dict(tolerance=2)), ("cnn", dict(budget=4)), ("mlp", dict(tolerance=2, mode="isolated"))],
)
def test_one_side_alone_is_searched(trained, name, options, sides):
    network, calibration, validation = trained(name)
    arrays = naive.grams(network, calibration)
    options = dict(tolerance=None) | options
    reference = naive.search(network, arrays, validation, sides="S" if sides == "input" else "T", **options)
    options = {key: value for key, value in options.items() if value is not None}
    for evaluation in ("exact", "fast"):
        plan = search(network, calibration, validation, sides=sides, evaluation=evaluation, **options)
        assert_equal_to_reference(plan, *reference, evaluation)
        assert plan.sides == sides and len(plan.probes) > 0
        whole = [layer.k_t == layer.m if sides == "input" else layer.k_s == layer.d for layer in plan.layers]
        assert all(whole)


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_layers_are_searched_in_the_order_of_their_gram_matrices(trained, mode):
    """Backward, a step from layer to layer goes back in the network: what was kept for the last one does not serve."""
    network, calibration, validation = trained("residual")
    grams = accumulate_grams(network, calibration, progress=False)
    plan = search_ranks(network, dict(reversed(grams.items())), validation, 2.5, mode, "exact", progress=False)
    arrays = dict(reversed(naive.grams(network, calibration).items()))
    assert_equal_to_reference(plan, *naive.search(network, arrays, validation, 2.5, mode))
    assert [entry.layer for entry in plan.layers] == list(grams)[::-1]


@pytest.mark.parametrize("name", SIZES)
def test_the_cases_above_are_not_trivial(trained, name):
    """Ranks strictly between 1 and full, probes of both outcomes on both sides, a network that has learnt something."""
    network, calibration, validation = trained(name)
    plan = search(network, calibration, validation, tolerance=2.5)
    assert plan.correct > 0.6 * plan.total
    assert sum(1 < layer.rank < min(layer.d, layer.m) for layer in plan.layers) >= len(plan.layers) / 3
    outcomes = {(probe.side, probe.passed) for probe in plan.probes}
    assert outcomes == {("S", True), ("S", False), ("T", True), ("T", False)}


def test_float32_agrees_with_the_literal_search_too():
    signal, steps, *counts = SIZES["mlp"]
    network = briefly_trained(small_mlp(), 8, signal, steps).float()
    calibration, validation = (
        [(images.float(), labels) for images, labels in in_batches(*structured_images(count, 8, signal, seed), 64)]
        for count, seed in zip(counts, (2, 3))
    )
    reference = naive.search(network, naive.grams(network, calibration), validation, 2)
    for evaluation in ("exact", "fast"):
        plan = search(network, calibration, validation, tolerance=2, evaluation=evaluation)
        assert_equal_to_reference(plan, *reference, evaluation)


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_goes_on_where_it_was_interrupted(trained, mode, tmp_path):
    network, calibration, validation = trained("cnn")
    grams, path = accumulate_grams(network, calibration, progress=False), tmp_path / "search.ckpt"
    options = dict(tolerance=1.0, mode=mode, evaluation="exact", progress=False)
    plan, asked = search_ranks(network, grams, validation, **options), []
    for left in range(len(grams) - 1, 0, -1):
        with pytest.raises(OutOfTime, match=f"{left} of {len(grams)} layers left"):
            search_ranks(network, grams, validation, **options, checkpoint=path, deadline=0.0)
        asked.append(len(read_json(path)["plan"]["probes"]))
    assert search_ranks(network, grams, validation, **options, checkpoint=path) == plan
    assert 0 < asked[0] < asked[-1] < len(plan.probes)


def test_goes_on_with_grams_summed_again_and_labels_of_any_layout(trained, tmp_path):
    network, calibration, validation = trained("cnn")
    grams, path = accumulate_grams(network, calibration, progress=False), tmp_path / "search.ckpt"
    strided = [(images, torch.stack([labels, labels], 1)[:, 1]) for images, labels in validation]
    plan = search_ranks(network, grams, strided, 1.0, progress=False)
    with pytest.raises(OutOfTime):
        search_ranks(network, grams, strided, 1.0, progress=False, checkpoint=path, deadline=0.0)
    again = {name: gram * (1 + 1e-14) for name, gram in grams.items()}
    assert search_ranks(network, again, strided, 1.0, progress=False, checkpoint=path).layers == plan.layers


def test_goes_on_with_no_other_search(trained, tmp_path):
    network, calibration, validation = trained("cnn")
    grams, path = accumulate_grams(network, calibration, progress=False), tmp_path / "search.ckpt"
    with pytest.raises(OutOfTime):
        search_ranks(network, grams, validation, 1.0, evaluation="exact", progress=False, checkpoint=path, deadline=0.0)
    other_network = copy.deepcopy(network)
    other_network[0].bias.data += 1e-3
    for other in (
        dict(tolerance=2.0),
        dict(mode="isolated"),
        dict(evaluation="fast"),
        dict(model=other_network),
        dict(grams=dict(reversed(grams.items()))),
        dict(grams={name: 2 * gram for name, gram in grams.items()}),
        dict(validation=[(images, labels.flip(0)) for images, labels in validation]),
        dict(validation=[(torch.zeros_like(images), labels) for images, labels in validation]),
    ):
        search = dict(model=network, grams=grams, validation=validation, tolerance=1.0, evaluation="exact")
        call = search | dict(checkpoint=path) | other
        with pytest.raises(
            ValueError, match="search.ckpt: of (another search|a search on other images); delete it to start again"
        ):
            search_ranks(**call)


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_leaves_the_network_as_it_is(trained, mode):
    network, calibration, validation = trained("cnn")
    network = copy.deepcopy(network)
    network[1].train()
    network[9].weight.requires_grad_(False)
    before = copy.deepcopy(network)
    search(network, calibration, validation, mode=mode, tolerance=2)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.state_dict().values()))
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None or q.grad is not None for p, q in zip(network.parameters(), before.parameters()))
    for module in network.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_training_mode_and_memory_do_not_matter(trained):
    network, calibration, validation = trained("residual")
    expected = search(network, calibration, validation, tolerance=2)
    assert search(copy.deepcopy(network).train(), calibration, validation, tolerance=2) == expected
    assert search(network, calibration, validation, tolerance=2, memory=0) == expected
    assert search(network, calibration, validation, tolerance=2, memory=200_000) == expected


def test_the_batches_do_not_matter(trained):
    network, calibration, validation = trained("cnn")
    images, labels = (torch.cat(parts) for parts in zip(*validation))
    expected = search(network, calibration, validation, tolerance=2)
    for size in (17, 150):
        assert search(network, calibration, in_batches(images, labels, size), tolerance=2) == expected


@pytest.mark.parametrize("name", ["cnn", "mlp", "residual"])
@pytest.mark.parametrize("tolerance", [0, 1, 4])
def test_joint_mode_loses_no_more_than_it_may(trained, name, tolerance):
    network, calibration, validation = trained(name)
    grams = accumulate_grams(network, calibration, progress=False)
    plan = search_ranks(network, grams, validation, tolerance, progress=False)
    correct = naive.count_correct(project_network(network, plan, grams).eval(), validation)
    assert correct == plan.layers[-1].correct
    assert plan.correct - correct <= 2 * len(plan.layers) * allowed_loss(tolerance, plan.total)
    steps = [plan.correct, *(layer.correct for layer in plan.layers)]
    assert all(b >= a - 2 * allowed_loss(tolerance, plan.total) for a, b in zip(steps, steps[1:]))


def test_isolated_mode_measures_each_layer_in_the_unmodified_network(trained):
    network, calibration, validation = trained("residual")
    plan = search(network, calibration, validation, tolerance=2, mode="isolated")
    grams = accumulate_grams(network, calibration, progress=False)
    for layer in plan.layers:
        alone = search_ranks(
            network, {layer.layer: grams[layer.layer]}, validation, tolerance=2, mode="isolated", progress=False
        )
        assert alone.layers == (layer,)
        assert plan.correct - layer.correct <= 2 * allowed_loss(2, plan.total)


def test_a_tolerance_of_everything_leaves_rank_one(trained):
    network, calibration, validation = trained("mlp")
    plan = search(network, calibration, validation, tolerance=100)
    assert all((layer.k_s, layer.k_t, layer.rank) == (1, 1, 1) for layer in plan.layers)


def test_layers_that_the_data_cannot_do_without_stay_whole():
    """Sixteen classes on an axis each, and one more that is predicted where nothing is left of an image."""
    network = nn.Sequential(nn.Linear(16, 17, bias=False)).double()
    network[0].weight.data.copy_(torch.cat([torch.zeros(1, 16), torch.eye(16)]))
    images, labels = torch.eye(16, dtype=torch.float64), torch.arange(1, 17)
    plan = search(network, [images], [(images, labels)], tolerance=0)
    assert (plan.layers[0].k_s, plan.layers[0].k_t, plan.layers[0].rank) == (16, 16, 16)
    assert plan.layers[0].correct == plan.correct == 16


def test_grams_choose_the_layers_and_their_order(trained):
    network, calibration, validation = trained("residual")
    grams = accumulate_grams(network, calibration, progress=False)
    for names in (["blocks.0.conv2", "head"], list(reversed(grams))):
        chosen = {name: grams[name] for name in names}
        plan = search_ranks(network, chosen, validation, tolerance=2, evaluation="exact", progress=False)
        assert [layer.layer for layer in plan.layers] == names
        arrays = {name: gram.numpy() for name, gram in chosen.items()}
        assert_equal_to_reference(plan, *naive.search(network, arrays, validation, 2))


class TestErrors:
    @pytest.fixture
    def parts(self):
        network = small_mlp().double()
        images, labels = structured_images(20)
        return network, accumulate_grams(network, [images], progress=False), [(images, labels)]

    @pytest.mark.parametrize("tolerance", [-1, -1e-9, 101, math.nan, math.inf])
    def test_tolerance(self, parts, tolerance):
        with pytest.raises(ValueError, match="tolerance.*between 0 and 100"):
            search_ranks(*parts, tolerance=tolerance, progress=False)

    def test_mode(self, parts):
        with pytest.raises(ValueError, match="'both'"):
            search_ranks(*parts, mode="both", progress=False)

    @pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))]])
    def test_no_validation_image(self, parts, batches):
        with pytest.raises(ValueError, match="validation set is empty"):
            search_ranks(*parts[:2], batches, progress=False)

    @pytest.mark.parametrize("label", [4, 9, -1])
    def test_wrong_class_count(self, parts, label):
        network, grams, [(images, labels)] = parts
        labels[3] = label
        with pytest.raises(ValueError, match="4 classes"):
            search_ranks(network, grams, [(images, labels)], progress=False)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_not_finite(self, parts, value):
        network, grams, batches = parts
        network[-1].bias.data[1] = value
        with pytest.raises(FloatingPointError, match="logits"):
            search_ranks(network, grams, batches, progress=False)

    def test_no_gram(self, parts):
        with pytest.raises(ValueError, match="empty"):
            search_ranks(parts[0], {}, parts[2], progress=False)

    def test_gram_of_an_unknown_layer(self, parts):
        network, grams, batches = parts
        with pytest.raises(ValueError, match="'conv1'.*not a matrix layer"):
            search_ranks(network, grams | {"conv1": torch.eye(3)}, batches, progress=False)

    @pytest.mark.parametrize("shape", [(23, 23), (24, 23), (24,)])
    def test_gram_of_the_wrong_shape(self, parts, shape):
        network, grams, batches = parts
        with pytest.raises(ValueError, match="'3' has 24 input features"):
            search_ranks(network, grams | {"3": torch.zeros(shape)}, batches, progress=False)

    def test_gram_that_is_not_finite_is_named(self, parts):
        network, grams, batches = parts
        grams["3"][0, 0] = math.nan
        with pytest.raises(FloatingPointError, match="'3'"):
            search_ranks(network, grams, batches, progress=False)


class Centred(nn.Module):
    """Changes the images that it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, images):
        images -= images.mean()
        return self.fc(images.flatten(1))


class TestAnswers:
    """What is compared image by image with a label, again and again."""

    def test_of_a_network_that_changes_the_images(self):
        images, labels = structured_images(10)
        with pytest.raises(ValueError, match="changes its input images in place"):
            Validation([(images, labels)]).count_correct(Centred().double())
        with pytest.raises(ValueError, match="changes its input images in place"):
            Validation.agreement(Centred().double(), [images])

    @pytest.mark.parametrize("shape", [(10, 1), (1, 10), (9,)])
    def test_labels_of_another_shape(self, shape):
        images, _ = structured_images(10)
        labels = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(ValueError, match=r"labels \(n,\), got logits \(10, 4\) and labels"):
            small_mlp().double()(images), Validation([(images, labels)]).count_correct(small_mlp().double())

    def test_logits_of_another_shape(self):
        images, labels = structured_images(10)
        network = nn.Sequential(small_mlp(), nn.Unflatten(1, (4, 1, 1))).double()
        with pytest.raises(ValueError, match=r"got logits \(10, 4, 1, 1\)"):
            Validation([(images, labels)]).count_correct(network)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
    def test_labels_of_another_type(self, trained, dtype):
        network, calibration, batches = trained("mlp")
        typed = [(images, labels.to(dtype)) for images, labels in batches]
        if dtype == torch.float32:
            with pytest.raises(ValueError, match="must be integers .*got torch.float32"):
                Validation(typed)
        else:
            expected = search(network, calibration, batches, tolerance=2)
            assert search(network, calibration, typed, tolerance=2) == expected

    @pytest.mark.parametrize("signal", [1.0, 0.1])  # no image is wrong, or more than half are
    def test_that_depend_on_who_shares_a_batch_are_searched_with_a_warning(self, signal):
        """Batch statistics in evaluation, too: the reference is counted in the batches of the probes."""
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4, track_running_stats=False))
        network = briefly_trained(network.double(), signal=signal).float()
        images, labels = structured_images(150, signal=signal)
        batches = [(images.float(), labels)]
        grams = accumulate_grams(network, batches, progress=False)
        with pytest.warns(UserWarning, match="depend on which images share a batch"):
            plan, exact = (
                search_ranks(network, grams, batches, 0.0, evaluation=kind, progress=False)
                for kind in ("fast", "exact")
            )
        assert plan == exact
        assert plan.correct == Validation(batches).hardest_first(network)[0].count_correct(network)
        assert plan.layers[0].k_s < plan.layers[0].d


def test_takes_grams_in_another_precision(trained):
    network, calibration, validation = trained("mlp")
    grams = {name: gram.float() for name, gram in accumulate_grams(network, calibration, progress=False).items()}
    assert search_ranks(network, grams, validation, 2.0, progress=False).layers


class TestValidation:
    def test_holds_what_can_be_read_once(self):
        batches = in_batches(*structured_images(10), 4)
        validation = Validation(iter(batches))
        assert validation.total == 10
        assert len(list(validation)) == len(list(validation)) == 3

    def test_leaves_large_data_sets_a_byte_a_pixel(self, monkeypatch):
        digits = datasets.load("digits10", train=60, test=50)
        network, batches = create("vgg11", width=0.06).eval(), digits.batches(digits.test, 16)
        held = Validation(batches).hardest_first(network)[0]
        monkeypatch.setattr(urank.search.validation, "MAX_FLOAT_BYTES", batches.nbytes - 1)
        left = Validation(batches).hardest_first(network)[0]
        assert isinstance(left.batches, datasets.Batches) and not isinstance(held.batches, datasets.Batches)
        assert left.total == held.total == 50
        assert held.batches.whole[0].shape == (50, 3, 32, 32)  # what the next order takes its images from
        for one, other in zip(left, held, strict=True):
            assert one[0].equal(other[0]) and one[1].equal(other[1])
        calibration = digits.batches(digits.train)
        plan = search(network, calibration, batches, tolerance=10)
        monkeypatch.setattr(urank.search.validation, "MAX_FLOAT_BYTES", batches.nbytes)
        assert search(network, calibration, batches, tolerance=10) == plan

    def test_counts_in_evaluation_mode(self, trained):
        network, _, validation = trained("cnn")
        network = copy.deepcopy(network).train()
        expected = naive.count_correct(copy.deepcopy(network).eval(), validation)
        assert Validation(validation).count_correct(network) == expected
        assert network.training

    def test_an_empty_batch_among_others_counts_nothing(self):
        network, (images, labels) = small_mlp().double(), structured_images(10)
        whole = Validation([(images, labels)]).count_correct(network)
        assert Validation([(images, labels), (images[:0], labels[:0])]).count_correct(network) == whole

    def test_hardest_first_is_the_same_images_by_their_margins(self, trained):
        network, _, batches = trained("cnn")
        ordered, margin, right = Validation(batches).hardest_first(network)
        assert [len(labels) for _, labels in ordered] == [2, 4, 8, 16, 32, 64, 24]  # of 150 in batches of 64
        with torch.no_grad():
            found = torch.cat([margins(network(images), labels) for images, labels in ordered])
            plain = torch.cat([margins(network(images), labels) for images, labels in batches])
        torch.testing.assert_close(found, plain.sort().values)
        assert margin.equal(plain.sort().values) and right.equal(margin > 0)
        assert ordered.total == sum(len(labels) for _, labels in batches)
        assert int((found > 0).sum()) == naive.count_correct(network, batches) == int(right.sum())

    def test_is_taken_by_the_search_as_it_is(self, trained):
        network, calibration, batches = trained("mlp")
        validation = Validation(iter(batches))
        expected = search(network, calibration, batches, tolerance=2)
        assert search(network, calibration, validation, tolerance=2) == expected
        assert search(network, calibration, validation, tolerance=2) == expected
        assert expected.counts == "labels"
        again = Validation(validation)
        assert again.total == validation.total
        assert all(a is b for one, other in zip(again, validation) for a, b in zip(one, other))

    def test_of_agreement_are_the_networks_own_answers(self, trained):
        network, _, batches = trained("cnn")
        training = copy.deepcopy(network).train()
        for source in ([images for images, _ in batches], batches, [(images, None) for images, _ in batches]):
            validation = Validation.agreement(training, iter(source))
            assert validation.counts == validation.hardest_first(network)[0].counts == "agreement"
            assert training.training
            with torch.no_grad():
                for (images, labels), (expected, _) in zip(validation, batches, strict=True):
                    assert images is expected
                    assert torch.equal(labels, network(images).argmax(1))
            assert validation.count_correct(network) == validation.total == sum(len(labels) for _, labels in batches)

    @pytest.mark.parametrize("mode", ["joint", "isolated"])
    def test_of_agreement_make_a_search_without_labels(self, trained, mode):
        network, calibration, batches = trained("cnn")
        answers = Validation.agreement(network, batches)
        plan = search(network, calibration, answers, tolerance=2, mode=mode, evaluation="exact")
        reference = naive.search(network, naive.grams(network, calibration), list(answers), 2, mode)
        assert_equal_to_reference(plan, *reference)
        assert plan.correct == plan.total == answers.total
        assert plan.counts == "agreement"
        assert any(1 < layer.rank < min(layer.d, layer.m) for layer in plan.layers)

    @pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 8, 8, dtype=torch.float64)]])
    def test_of_agreement_need_images(self, batches):
        with pytest.raises(ValueError, match="empty"):
            Validation.agreement(small_mlp().double(), batches)

    def test_of_agreement_need_answers_that_are_numbers(self):
        network, (images, _) = small_mlp().double(), structured_images(4)
        network[-1].bias.data[1] = math.nan
        with pytest.raises(FloatingPointError, match="logits"):
            Validation.agreement(network, [images])

    def test_count_nothing_else(self):
        with pytest.raises(ValueError, match="'labels' or 'agreement', got 'votes'"):
            Validation([structured_images(2)], counts="votes")

    def test_margins(self):
        logits = torch.tensor([[3.0, 1, 2], [3, 1, 2], [0, 0, 0]])
        assert margins(logits, torch.tensor([0, 1, 2])).tolist() == [1, -2, 0]


@pytest.mark.parametrize(
    ("tolerance", "total", "images"),
    [(0, 10_000, 0), (0.1, 10_000, 10), (0.57, 10_000, 57), (0.1, 999, 0), (100, 7, 7), (1e-05, 10**7, 1)],
)
def test_allowed_loss_is_exact_decimal_arithmetic(tolerance, total, images):
    assert allowed_loss(tolerance, total) == naive.allowed_loss(tolerance, total) == images


@pytest.mark.parametrize(
    ("total", "most", "least", "sizes"),
    [
        (100, 64, 1, [2, 4, 8, 16, 32, 38]),
        (3, 256, 1, [3]),
        (7, 1, 1, [1] * 7),
        (21, 32, 4, [4, 8, 9]),
        (13, 32, 4, [4, 9]),
        (300, 64, 1, [2, 4, 8, 16, 32, 64, 64, 64, 46]),
    ],
)
def test_batches_grow(total, most, least, sizes):
    assert growing_sizes(total, most, least) == sizes and sum(sizes) == total
