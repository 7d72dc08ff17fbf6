import copy

import pytest
import torch
from conftest import NETWORKS, briefly_trained, in_batches, small_mlp, structured_images
from torch import nn

from urank.calibration import accumulate_grams
from urank.factorize import project_network
from urank.layers import evaluating
from urank.numerics import has_fast_bfloat16
from urank.search.bisection import search_ranks
from urank.search.probes import (
    SAFETY,
    Bfloat16,
    Exact,
    Near,
    Screened,
    Sequential,
    WrongPresumption,
    choose_counter,
    margins,
)
from urank.search.replay import Replay
from urank.search.validation import Validation


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


@pytest.mark.parametrize("evaluation", ["near", "screened"])
@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 4.0])
def test_gives_the_plan_of_exact(trained, mode, tolerance, evaluation):
    network, grams, batches = trained
    plans = [
        search_ranks(network, grams, batches, tolerance, mode, evaluation=kind, progress=False)
        for kind in ("exact", evaluation)
    ]
    assert decisions(plans[1]) == decisions(plans[0])
    assert plans[1].layers == plans[0].layers
    assert any(not probe.passed for probe in plans[0].probes)


@pytest.mark.parametrize("evaluation", ["exact", "near", "screened"])
def test_an_autocast_around_the_search_changes_nothing(trained, evaluation):
    network, grams, batches = trained
    options = dict(tolerance=1.0, evaluation=evaluation, progress=False)
    plan = search_ranks(network, grams, batches, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert search_ranks(network, grams, batches, **options) == plan


@pytest.mark.parametrize("kind", [Near, Screened])  # the numbers are such that bfloat16 holds them exactly
class TestReach:
    @pytest.fixture
    def ranked(self):
        """Forty images with the margins 1 to 40, in four batches, and a weight for each image's margin."""
        network = nn.Linear(40, 2, bias=False)
        network.weight.data.copy_(torch.stack([torch.zeros(40), torch.arange(1.0, 41)]))
        return network, in_batches(torch.eye(40), torch.ones(40, dtype=torch.long), 10)

    def prepared(self, kind, network, batches):
        near = counter_of(kind, network, batches)
        assert near.prepare(0) == 40
        near.images = 0
        return near

    @pytest.mark.parametrize("loss, run", [(0.0, 10), (5.0, 10), (5.5, 20), (10.5, 30), (20.0, 40)])
    def test_runs_on_while_the_next_margin_is_within_twice_the_loss(self, kind, ranked, loss, run):
        network, batches = ranked
        with evaluating(network):
            near = self.prepared(kind, network, batches)
            network.weight.data[1] -= loss
            expected = counter_of(Exact, network, batches).count(0)
            assert near.count(0) == expected == 40 - int(loss)  # a tie is answered by the first class
            assert near.images == run
            assert near.confirm(0) == expected
            assert near.images == 40 + (kind is Screened) * 10  # on which it measures its error

    def test_judges_by_a_tenth_of_the_images_at_least(self, kind, ranked):
        network, batches = ranked
        batches = in_batches(*(torch.cat(parts) for parts in zip(*batches)), 3)
        with evaluating(network):
            near = self.prepared(kind, network, batches)
            assert near.count(40) == 40
            assert near.images == 6

    def test_a_failure_is_certain(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            near = self.prepared(kind, network, batches)
            network.weight.data[1, :15] = -1
            assert near.count(30) is None
            assert near.images == 20

    def test_what_one_side_left_out_and_the_other_ran_is_found_out(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            near = self.prepared(kind, network, batches)
            network.weight.data[1, 39] = -1
            assert near.count(0) == near.prepare(0) == 40  # the first batch was run
            network.weight.data[1, 0] -= 25
            assert near.count(0) == 38  # all were run
            with pytest.raises(WrongPresumption):
                near.confirm(0)

    def test_after_a_wrong_presumption_nothing_is_left_out_until_the_layer_is_done(self, kind, ranked):
        network, batches = ranked
        with evaluating(network):
            near = self.prepared(kind, network, batches)
            network.weight.data[1, 39] = -1  # out of reach by all that is seen of the others
            assert near.count(0) == 40
            with pytest.raises(WrongPresumption):
                near.confirm(0)
            near.forget()
            assert near.prepare(0) == near.count(0) == 39
            near.images = 0
            assert near.count(0) == 39
            assert near.images == 40
            assert near.confirm(0) == 39
            assert near.presumes and near.safety == 2 * SAFETY


class TestNear:
    @pytest.mark.parametrize("warm_start", [False, True])
    @pytest.mark.parametrize("mode", ["joint", "isolated"])
    def test_a_layer_is_searched_again_where_too_much_was_presumed(self, trained, mode, warm_start, monkeypatch):
        network, grams, batches = trained
        options = dict(tolerance=1.0, mode=mode, warm_start=warm_start, progress=False)
        monkeypatch.setattr("urank.search.probes.SAFETY", 0.0)  # every image that was right is presumed to stay right
        forgotten = []
        monkeypatch.setattr(Near, "forget", lambda near, forget=Near.forget: (forgotten.append(near), forget(near)))
        plans = [search_ranks(network, grams, batches, evaluation=kind, **options) for kind in ("exact", "near")]
        again = len(forgotten) - 1 - (mode == "isolated") * len(grams)  # beside the first, and where W comes back
        assert 1 <= again <= len(grams)  # at most once a layer
        assert decisions(plans[1]) == decisions(plans[0])
        assert plans[1].layers == plans[0].layers

    def test_sorts_images_and_activations_by_their_margins(self, trained):
        network, grams, batches = trained
        network, layer = copy.deepcopy(network), list(grams)[-1]
        with evaluating(network):
            validation = Validation(batches)
            near = Near(network, Replay(network, validation), validation.total)
            near.replay.advance(network.get_submodule(layer))
            near.prepare(0)
            near.sort()
            assert near.replay._kept
            images, labels = (torch.cat(parts) for parts in zip(*near.replay.batches))
            logits, of_replay = (torch.cat(parts) for parts in zip(*near.replay))
            assert of_replay.equal(labels)
            torch.testing.assert_close(logits, network(images))
            margin = margins(logits, labels)
            assert (margin[1:] - margin[:-1] > -1e-5).all()
            torch.testing.assert_close(torch.cat(near.passed), margin)
            assert near.prepare(0) == Validation(batches).count_correct(network)


class TestScreened:
    @pytest.fixture
    def close(self):
        """Two logits 2 % of the input's apart: bfloat16, of 8 bits, cannot tell them from equal ones, or from worse."""
        network = nn.Linear(1, 2, bias=False)
        network.weight.data.copy_(torch.tensor([[1.0], [1.001]]))
        images, labels = torch.linspace(1, 2, 40)[:, None], torch.ones(40, dtype=torch.long)
        return network, in_batches(images, labels, 16)

    def test_settles_what_bfloat16_gets_wrong(self, close):
        network, batches = close
        with evaluating(network):
            assert counter_of(Bfloat16, network, batches).count(0) == 0  # equal logits: the first class
            screened = counter_of(Screened, network, batches)
            screened.prepare(0)
            screened.images_settled = 0
            assert screened.count(0) == counter_of(Exact, network, batches).count(0) == 40
            assert screened.images_settled == 40

    def test_settles_where_bfloat16_gives_no_number(self, close, monkeypatch):
        network, batches = close
        with evaluating(network):
            screened = counter_of(Screened, network, batches)
            screened.prepare(0)
            screened.images_settled = 0
            outputs = screened.outputs
            monkeypatch.setattr(
                screened, "outputs", lambda: ((logits * torch.nan, labels) for logits, labels in outputs())
            )
            assert screened.count(0) == 40 == screened.images_settled

    def test_takes_a_network_in_another_precision(self, close):
        network, batches = close
        network, batches = network.double(), [(images.double(), labels) for images, labels in batches]
        with evaluating(network):
            assert counter_of(Screened, network, batches).prepare(0) == 40

    @pytest.mark.parametrize("label, correct", [(0, 40), (1, 0)])
    def test_a_tie_is_decided_as_by_the_first_of_the_largest_logits(self, close, label, correct):
        network, batches = close
        network.weight.data.zero_()
        batches = [(images, torch.full_like(labels, label)) for images, labels in batches]
        with evaluating(network):
            screened = counter_of(Screened, network, batches)
            screened.prepare(0)
            assert screened.count(0) == counter_of(Exact, network, batches).count(0) == correct

    def test_leaves_alone_what_is_beyond_doubt(self, close):
        network, batches = close
        network.weight.data[1] = 5
        with evaluating(network):
            screened = counter_of(Screened, network, batches)
            assert screened.prepare(0) == 40
            assert screened.images == 16 + 40  # the first batch to measure on, then all
            assert screened.images_settled == 0

    def test_error_is_the_largest_seen(self, trained):
        network, _, batches = trained
        with evaluating(network):
            screened = counter_of(Screened, network, batches)
            screened.prepare(0)
            rounded, exact = (
                torch.cat([margins(logits, labels) for logits, labels in outputs])
                for outputs in (screened.outputs(), screened.replay)
            )
            difference = (exact - rounded).abs()
            assert screened.error >= difference[: len(batches[0][1])].max() > 0
            # So large that about half of the images are settled
            screened.error = rounded.abs().median().item() / SAFETY
            doubtful, screened.images_settled = rounded.abs() < screened.doubt, 0
            screened.count(0)
            assert screened.images_settled >= doubtful.sum() > len(rounded) / 3
            assert screened.error >= difference[doubtful].max()

    def test_a_growing_error_settles_more(self, trained, monkeypatch):
        """No image stays unsettled whose margin is within the error that is known at the end."""
        network, _, batches = trained
        with evaluating(network):
            screened, seen = counter_of(Screened, network, batches), []
            screened.prepare(0)
            margin = torch.cat([margins(logits, labels) for logits, labels in screened.outputs()])
            screened.error = margin.abs().median().item() / SAFETY
            settle = screened._in_full_precision
            spied = lambda marks, first: (seen.append(marks), settle(marks, first))[1]  # noqa: E731
            monkeypatch.setattr(screened, "_in_full_precision", spied)
            screened.count(0)
        settled = torch.stack(seen).any(0)
        assert (margin[~settled].abs() >= screened.doubt).all()

    def test_stops_where_failure_is_certain(self, close):
        network, batches = close
        network.weight.data[1] = -5
        with evaluating(network):
            screened = counter_of(Screened, network, batches)
            screened.prepare(0)
            assert screened.count(30) is None
            assert screened.images == 16 + 40 + 16  # the first batch to measure on, all, and the first of the count


class TestSequential:
    def simulated(self, lost, order):
        """A counter whose network gets 1,000 images right, then all but `lost` of them, met in `order`."""
        right = torch.ones(1000, dtype=torch.long)
        right[:lost] = 0
        network = nn.Identity()
        images = nn.functional.one_hot(right[order], 2).float()
        batches = in_batches(images, torch.ones(1000, dtype=torch.long), 50)
        counter = counter_of(Sequential, network, batches)
        counter.right, counter.before, counter.batches = torch.ones(1000, dtype=torch.bool), 1000, len(batches)
        return counter

    def test_accepts_a_lossless_probe_early(self):
        counter = self.simulated(0, torch.arange(1000))
        assert counter.count(990) == 990
        assert counter.images < 1000

    def test_wrong_acceptance_is_as_rare_as_it_says(self):
        accepted = sum(self.simulated(11, torch.randperm(1000)).count(990) is not None for _ in range(300))
        assert accepted <= 0.05 * 300

    def test_failure_is_certain(self):
        assert self.simulated(300, torch.randperm(1000)).count(990) is None

    def test_prepare_counts_all(self, trained):
        network, _, batches = trained
        with evaluating(network):
            sequential = counter_of(Sequential, network, batches)
            assert sequential.prepare(0) == Validation(batches).count_correct(network)

    def test_plan_is_within_the_tolerance(self, trained):
        """Each side is counted whole in the end: the numbers correct in the plan are those of the network."""
        network, grams, batches = trained
        plan = search_ranks(network, grams, batches, 1.0, evaluation="sequential", progress=False)
        exact = search_ranks(network, grams, batches, 1.0, evaluation="exact", progress=False)
        assert plan.correct == exact.correct
        projected = project_network(network, plan, grams)
        assert Validation(batches).count_correct(projected) == plan.layers[-1].correct


class TestWarmStart:
    def test_asks_fewer_questions_of_layers_alike(self):
        """Ten layers with the same planted subspace: after the first, the energy of the one before is the answer."""
        torch.manual_seed(0)
        V = torch.linalg.qr(torch.randn(64, 64))[0]
        layers = [nn.Linear(64, 64, bias=False) for _ in range(10)]
        for layer in layers:
            layer.weight.data.copy_(V @ V.T)  # the identity
        network = nn.Sequential(*layers)
        images = torch.randn(400, 8) @ torch.diag(torch.linspace(2, 1, 8)) @ V[:, :8].T
        batches = [(images, network(images).detach().argmax(1))]
        grams = accumulate_grams(network, batches, progress=False)
        cold, warm = (
            search_ranks(network, grams, batches, 0, warm_start=start, progress=False) for start in (False, True)
        )
        assert [entry.k_s for entry in warm.layers] == [entry.k_s for entry in cold.layers] == [8] * 10
        assert len(warm.probes) < 0.6 * len(cold.probes)

    def test_every_answer_has_passed(self, trained):
        network, grams, batches = trained
        plan = search_ranks(network, grams, batches, 1.0, warm_start=True, progress=False)
        for entry in plan.layers:
            passed = {(p.side, p.k) for p in plan.probes if p.layer == entry.layer and p.passed}
            assert entry.k_s == entry.d or ("S", entry.k_s) in passed
            assert entry.k_t == entry.m or ("T", entry.k_t) in passed


def test_auto_screens_where_bfloat16_is_fast_and_else_runs_near_images():
    network = small_mlp()
    screens = has_fast_bfloat16(torch.device("cpu"))
    assert choose_counter("auto", network) is (Screened if screens else Near)
    assert choose_counter("auto", network.double()) is Near


def test_unknown_evaluation_is_named(trained):
    network, grams, batches = trained
    with pytest.raises(ValueError, match="'auto' or one of exact, near, screened, bfloat16, sequential, got 'fast'"):
        search_ranks(network, grams, batches, evaluation="fast", progress=False)
