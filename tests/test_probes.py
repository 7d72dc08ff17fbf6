import copy

import pytest
import torch
from conftest import NETWORKS, briefly_trained, in_batches, small_mlp, structured_images
from torch import nn

from urank._version import __version__
from urank.calibration import accumulate_grams
from urank.layers import evaluating
from urank.numerics import has_fast_bfloat16
from urank.search import bisection
from urank.search.bisection import search_ranks
from urank.search.probes import SAFETY, ExactCounter, FastCounter, ScreenedCounter, WrongSkip, counter_for, in_bfloat16
from urank.search.replay import Replay
from urank.search.validation import Validation, margins


@pytest.fixture(scope="module", params=["cnn", "mlp", "residual"])
def trained(request):
    """(network, Gram matrices, validation batches) in float32."""
    torch.manual_seed(0)
    build, size = NETWORKS[request.param]
    network = briefly_trained(build(), size, signal=0.3).float()
    calibration, validation = structured_images(200, size, 0.3, seed=2), structured_images(300, size, 0.3, seed=3)
    batches = in_batches(validation[0].float(), validation[1], 64)
    grams = accumulate_grams(network, in_batches(calibration[0].float(), calibration[1], 64), progress=False)
    return network, grams, batches


def counter_of(kind, network, batches):
    batches = list(batches)
    return kind(network, Replay(network, batches), sum(len(labels) for _, labels in batches))


def decisions(plan):
    return [(probe.layer, probe.side, probe.k, probe.passed) for probe in plan.probes]


@pytest.fixture
def search_with(monkeypatch):
    """Call `search_ranks` with a given counter class, whatever this device would choose for "fast"."""

    def search(counter, *args, **options):
        monkeypatch.setattr(bisection, "counter_for", lambda *_: counter)
        return search_ranks(*args, progress=False, **options)

    return search


@pytest.mark.parametrize("kind", [FastCounter, ScreenedCounter])
@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 4.0])
def test_fast_gives_the_plan_of_exact(trained, search_with, mode, tolerance, kind):
    exact, fast = (search_with(counter, *trained, tolerance, mode) for counter in (ExactCounter, kind))
    assert decisions(fast) == decisions(exact)
    assert fast.layers == exact.layers
    assert any(not probe.passed for probe in exact.probes)


@pytest.mark.parametrize("kind", [ExactCounter, FastCounter, ScreenedCounter])
def test_an_autocast_around_the_search_changes_nothing(trained, search_with, kind):
    plan = search_with(kind, *trained, tolerance=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert search_with(kind, *trained, tolerance=1.0) == plan


def test_a_plan_says_how_its_probes_were_decided(trained, search_with):
    plans = [search_with(kind, *trained, tolerance=4.0) for kind in (ExactCounter, FastCounter, ScreenedCounter)]
    said = [(plan.evaluation, plan.precision, plan.version) for plan in plans]
    kinds = [("exact", "float32"), ("fast", "float32"), ("fast", "bfloat16")]
    assert said == [(*kind, __version__) for kind in kinds]


@pytest.mark.parametrize("kind", [FastCounter, ScreenedCounter])  # all numbers are exact in bfloat16
class TestSkipping:
    @pytest.fixture
    def ranked(self):
        """Forty images with the margins 1 to 40, in four batches, and a weight for each image's margin."""
        network = nn.Linear(40, 2, bias=False)
        network.weight.data.copy_(torch.stack([torch.zeros(40), torch.arange(1.0, 41)]))
        return network, in_batches(torch.eye(40), torch.ones(40, dtype=torch.long), 10)

    def prepared(self, kind, network, batches):
        counter = counter_of(kind, network, batches)
        assert counter.begin_side(0) == 40
        counter.images = 0
        return counter

    @pytest.mark.parametrize("loss, run", [(0.0, 10), (5.0, 10), (5.5, 20), (10.5, 30), (20.0, 40)])
    def test_stops_when_the_next_margin_exceeds_twice_the_loss(self, kind, ranked, loss, run):
        network, batches = ranked
        with evaluating(network):
            counter = self.prepared(kind, network, batches)
            network.weight.data[1] -= loss
            expected = counter_of(ExactCounter, network, batches).count(0)
            assert counter.count(0) == expected == 40 - int(loss)  # a tie is answered by the first class
            assert counter.images == run
            assert counter.finish_layer(0) == expected
            assert counter.images == 40 + (kind is ScreenedCounter) * 10  # on which it measures its error

    def test_runs_at_least_a_tenth_of_the_images(self, kind, ranked):
        network, batches = ranked
        batches = in_batches(*(torch.cat(parts) for parts in zip(*batches)), 3)
        with evaluating(network):
            counter = self.prepared(kind, network, batches)
            assert counter.count(40) == 40
            assert counter.images == 6

    def test_a_failure_is_certain(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            counter = self.prepared(kind, network, batches)
            network.weight.data[1, :15] = -1
            assert counter.count(30) is None
            assert counter.images == 20

    def test_a_wrong_skip_on_one_side_is_found_when_the_other_side_runs_the_image(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            counter = self.prepared(kind, network, batches)
            network.weight.data[1, 39] = -1
            assert counter.count(0) == counter.begin_side(0) == 40  # the first batch was run
            network.weight.data[1, 0] -= 25
            assert counter.count(0) == 38  # all were run
            with pytest.raises(WrongSkip):
                counter.finish_layer(0)

    def test_after_a_wrong_skip_nothing_is_skipped_until_the_layer_is_done(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            counter = self.prepared(kind, network, batches)
            network.weight.data[1, 39] = -1  # a loss that no other image shows
            assert counter.count(0) == 40
            with pytest.raises(WrongSkip):
                counter.finish_layer(0)
            counter.reset()
            assert counter.begin_side(0) == counter.count(0) == 39
            counter.images = 0
            assert counter.count(0) == 39
            assert counter.images == 40
            assert counter.finish_layer(0) == 39
            assert counter.may_skip and counter.safety == 2 * SAFETY


class TestFast:
    @pytest.mark.parametrize("mode", ["joint", "isolated"])
    def test_a_layer_is_searched_again_after_a_wrong_skip(self, trained, search_with, mode, monkeypatch):
        resets, reset = [], FastCounter.reset
        monkeypatch.setattr("urank.search.probes.SAFETY", 0.0)  # skip every image that was correct
        monkeypatch.setattr(FastCounter, "reset", lambda counter: (resets.append(counter), reset(counter)))
        exact, fast = (search_with(kind, *trained, tolerance=1.0, mode=mode) for kind in (ExactCounter, FastCounter))
        layers = len(exact.layers)
        again = len(resets) - 1 - (mode == "isolated") * layers  # without the first, and those that restore W
        assert 1 <= again <= layers  # at most once per layer
        assert decisions(fast) == decisions(exact)
        assert fast.layers == exact.layers

    def test_sorts_images_and_activations_by_their_margins(self, trained):
        network, grams, batches = trained
        network, layer = copy.deepcopy(network), list(grams)[-1]
        with evaluating(network):
            validation = Validation(batches)
            counter = FastCounter(network, Replay(network, validation), validation.total)
            counter.replay.advance(network.get_submodule(layer))
            counter.begin_side(0)
            counter.sort_images()
            assert counter.replay._kept
            images, labels = (torch.cat(parts) for parts in zip(*counter.replay.batches))
            logits, of_replay = (torch.cat(parts) for parts in zip(*counter.replay))
            assert of_replay.equal(labels)
            torch.testing.assert_close(logits, network(images))
            margin = margins(logits, labels)
            assert (margin[1:] - margin[:-1] > -1e-5).all()
            torch.testing.assert_close(torch.cat(counter.latest), margin)
            assert counter.begin_side(0) == Validation(batches).count_correct(network)


class TestScreened:
    @pytest.fixture
    def close(self):
        """A network whose two logits differ by 0.1 %, which bfloat16, with 8 bits, cannot resolve."""
        network = nn.Linear(1, 2, bias=False)
        network.weight.data.copy_(torch.tensor([[1.0], [1.001]]))
        images, labels = torch.linspace(1, 2, 40)[:, None], torch.ones(40, dtype=torch.long)
        return network, in_batches(images, labels, 16)

    def test_repeats_what_bfloat16_gets_wrong(self, close):
        network, batches = close
        with evaluating(network):
            rounded = in_bfloat16(iter(Replay(network, batches)), network)
            assert all((logits.argmax(1) == 0).all() for logits, _ in rounded)  # equal logits: the first class
            counter = counter_of(ScreenedCounter, network, batches)
            counter.begin_side(0)
            counter.images_repeated = 0
            assert counter.count(0) == counter_of(ExactCounter, network, batches).count(0) == 40
            assert counter.images_repeated == 40

    def test_repeats_images_whose_bfloat16_logits_are_nan(self, close, monkeypatch):
        network, batches = close
        with evaluating(network):
            counter = counter_of(ScreenedCounter, network, batches)
            counter.begin_side(0)
            counter.images_repeated = 0
            outputs = counter.outputs
            monkeypatch.setattr(
                counter, "outputs", lambda: ((logits * torch.nan, labels) for logits, labels in outputs())
            )
            assert counter.count(0) == 40 == counter.images_repeated

    def test_takes_a_network_in_another_precision(self, close):
        network, batches = close
        network, batches = network.double(), [(images.double(), labels) for images, labels in batches]
        with evaluating(network):
            assert counter_of(ScreenedCounter, network, batches).begin_side(0) == 40

    @pytest.mark.parametrize("label, correct", [(0, 40), (1, 0)])
    def test_a_tie_is_decided_as_by_the_first_of_the_largest_logits(self, close, label, correct):
        network, batches = close
        network.weight.data.zero_()
        batches = [(images, torch.full_like(labels, label)) for images, labels in batches]
        with evaluating(network):
            counter = counter_of(ScreenedCounter, network, batches)
            counter.begin_side(0)
            assert counter.count(0) == counter_of(ExactCounter, network, batches).count(0) == correct

    def test_repeats_no_image_with_a_large_margin(self, close):
        network, batches = close
        network.weight.data[1] = 5
        with evaluating(network):
            counter = counter_of(ScreenedCounter, network, batches)
            assert counter.begin_side(0) == 40
            assert counter.images == 16 + 40  # the first batch to measure on, then all
            assert counter.images_repeated == 0

    def test_error_is_the_largest_seen(self, trained):
        network, _, batches = trained
        with evaluating(network):
            counter = counter_of(ScreenedCounter, network, batches)
            counter.begin_side(0)
            rounded, exact = (
                torch.cat([margins(logits, labels) for logits, labels in outputs])
                for outputs in (counter.outputs(), counter.replay)
            )
            difference = (exact - rounded).abs()
            assert counter.error >= difference[: len(batches[0][1])].max() > 0
            # Make the error so large that about half of the images are repeated.
            counter.error = rounded.abs().median().item() / SAFETY
            doubtful, counter.images_repeated = rounded.abs() < counter.uncertainty, 0
            counter.count(0)
            assert counter.images_repeated >= doubtful.sum() > len(rounded) / 3
            assert counter.error >= difference[doubtful].max()

    def test_a_growing_error_repeats_more_images(self, trained, monkeypatch):
        """At the end, every image whose margin is within the largest error was repeated."""
        network, _, batches = trained
        with evaluating(network):
            counter, seen = counter_of(ScreenedCounter, network, batches), []
            counter.begin_side(0)
            margin = torch.cat([margins(logits, labels) for logits, labels in counter.outputs()])
            counter.error = margin.abs().median().item() / SAFETY
            settle = counter._in_full_precision
            spied = lambda marks, first: (seen.append(marks), settle(marks, first))[1]  # noqa: E731
            monkeypatch.setattr(counter, "_in_full_precision", spied)
            counter.count(0)
        settled = torch.stack(seen).any(0)
        assert (margin[~settled].abs() >= counter.uncertainty).all()

    def test_stops_where_failure_is_certain(self, close):
        network, batches = close
        network.weight.data[1] = -5
        with evaluating(network):
            counter = counter_of(ScreenedCounter, network, batches)
            counter.begin_side(0)
            assert counter.count(30) is None
            assert counter.images == 16 + 40 + 16  # the first batch to measure on, all, and the first of the count


def test_fast_screens_in_bfloat16_where_the_device_is_fast_at_it():
    network = small_mlp()
    screens = has_fast_bfloat16(torch.device("cpu"))
    assert counter_for("exact", network) is ExactCounter
    assert counter_for("fast", network) is (ScreenedCounter if screens else FastCounter)
    assert counter_for("fast", network.double()) is FastCounter


@pytest.mark.parametrize("evaluation", ["auto", "near", "bfloat16", ""])
def test_an_unknown_evaluation_is_named(trained, evaluation):
    with pytest.raises(ValueError, match=f"'exact' or 'fast', got '{evaluation}'"):
        search_ranks(*trained, evaluation=evaluation, progress=False)
