import pickle
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Trap
from timm.data import Mixup
from torch import nn
from torch.nn import functional as F

from urank import datasets
from urank.deadline import OutOfTime
from urank.search.validation import evaluate
from urank.training.fitting import augment, epoch_seed, fit, make_optimizer, make_schedule
from urank.training.recipe import Recipe

STEPS = 3  # batches per epoch of `digits` with `QUICK`
QUICK = Recipe(epochs=3, batch_size=20, lr=0.05, crop=2, flip=True)
CONSTANT = dict(schedule="multistep", crop=0, flip=False)  # a constant learning rate, no augmentation
STILL = Recipe(epochs=1, batch_size=20, lr=1e-30, **CONSTANT)  # too small a learning rate to change float32 weights


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits10", train=STEPS * 20 + 5, test=20)


def small_network(seed=0):
    """A network with float32 and int64 buffers (batch norm), which a checkpoint must contain too."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def linear_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def fitted(dataset, recipe, seed=0, **options):
    network = small_network()
    return network, fit(network, dataset, recipe, seed, **options)


def same_bits(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def at_each_forward(network, act):
    """Call act(number of training batches so far, images) before each training batch of `network`."""
    seen = 0

    def hook(module, inputs):
        nonlocal seen
        if module.training:
            seen += 1
            act(seen, inputs[0])

    network.register_forward_pre_hook(hook)


class TestRecipe:
    @pytest.mark.parametrize(
        "wrong, named",
        [
            (dict(epochs=-1), "epochs .*got -1"),
            (dict(batch_size=0), "batch_size .*got 0"),
            (dict(lr=0), "lr .*got 0"),
            (dict(lr=-0.1), "lr .*got -0.1"),
            (dict(schedule="linear"), "'cosine', got 'linear'"),
            (dict(precision="float16"), "'float16'"),
            (dict(compile="yes"), "'yes'"),
            (dict(capture=1), "capture must be true or false, got 1"),
            (dict(capture=True, compile=True), "choose one"),
            (dict(flip="no"), "flip must be true or false, got 'no'"),
            (dict(milestones=["9"]), "milestones must be integers"),
            (dict(optimizer="adam"), "'sgd', 'adamw', got 'adam'"),
            (dict(lr=float("nan")), "lr"),
            (dict(lr="1e-1"), "lr"),
            (dict(epochs=1.5), "epochs"),
            (dict(batch_size=2.5), "batch_size"),
            (dict(crop=0.5), "crop"),
            (dict(crop=-1), "crop"),
            (dict(warmup=1.5), "warmup"),
            (dict(ema_decay=1.5), "ema_decay"),
            (dict(ema_decay="0.9"), "ema_decay"),
            (dict(momentum=-0.1), "momentum"),
            (dict(weight_decay=-0.1), "weight_decay"),
            (dict(label_smoothing=1.5), "label_smoothing"),
            (dict(mixup=-0.2), "mixup .*got -0.2"),
            (dict(cutmix="1"), "cutmix must be a number"),
        ],
    )
    def test_refuses(self, wrong, named):
        with pytest.raises(ValueError, match=f"recipe.*{named}"):
            Recipe(**dict(epochs=1) | wrong)

    def test_accepts_a_list_of_milestones(self):
        assert Recipe(1, milestones=[3, 4]) == Recipe(1, milestones=(3, 4))


def learning_rates(recipe, steps):
    """The learning rate of every step of a fit, and the rate after the last step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule = make_schedule(optimizer, recipe, steps)
    rates = []
    for _ in range(recipe.epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step_update(len(rates)) if recipe.schedule == "cosine" else schedule.step()
    return rates, optimizer.param_groups[0]["lr"]


class TestSchedule:
    def test_one_cycle_rises_to_its_peak_and_falls_to_zero(self):
        rates, last = learning_rates(Recipe(epochs=9, lr=0.3, warmup=0.2), steps=11)
        peak = int(np.argmax(rates))
        assert peak == 19  # of 99
        assert rates[peak] == pytest.approx(0.3)
        assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
        assert rates[0] < 0.05 * 0.3 and 0 < rates[-1] < 0.001 * 0.3 and last < 1e-5 * 0.3

    @pytest.mark.parametrize("steps", range(1, 13))
    def test_one_cycle_of_any_length(self, steps):
        rates, last = learning_rates(Recipe(epochs=1, lr=0.1), steps)
        assert len(rates) == steps and all(0 < rate <= 0.1 + 1e-12 for rate in rates) and last < 1e-5

    def test_multistep_divides_by_ten(self):
        recipe = Recipe(epochs=6, lr=0.5, schedule="multistep", milestones=(2, 5))
        rates, last = learning_rates(recipe, steps=4)
        assert rates == pytest.approx([0.5] * 8 + [0.05] * 12 + [0.005] * 4)
        assert last == pytest.approx(0.005)

    @pytest.mark.parametrize("warmup", [0.2, 1.0, 0.001])
    def test_cosine_rises_linearly_and_falls_to_zero(self, warmup):
        recipe = Recipe(epochs=5, lr=0.3, schedule="cosine", warmup=warmup)
        rates, last = learning_rates(recipe, steps=4)
        rising = min(round(20 * warmup), 19)
        falling = [0.15 * (1 + np.cos(np.pi * step / (20 - rising))) for step in range(20 - rising)]
        assert rates == pytest.approx([*np.linspace(0.033 * 0.3, 0.3, rising + 1)[:-1], *falling]) and last == 0

    def test_epochs_have_distinct_seeds(self):
        seeds = {epoch_seed(seed, epoch) for seed in range(20) for epoch in range(50)}
        assert len(seeds) == 1000
        assert epoch_seed(3, 4) == epoch_seed(3, 4)


class TestAugment:
    def seeded(self, seed=0):
        return torch.Generator().manual_seed(seed)

    def images(self, count, size=6):
        return torch.randint(0, 256, (count, 3, size, size), generator=self.seeded(9), dtype=torch.uint8)

    @pytest.mark.parametrize("crop, flip", [(2, True), (2, False), (1, True), (0, True)])
    def test_returns_windows_of_the_padded_image_or_its_mirror_image(self, crop, flip):
        images = self.images(count=600)
        found = set()
        for image, out in zip(images.numpy(), augment(images, Recipe(1, crop=crop, flip=flip), self.seeded()).numpy()):
            windows = {}
            for mirrored in (False, True)[: 1 + flip]:
                padded = np.pad(
                    image[:, :, ::-1] if mirrored else image, [(0, 0), (crop, crop), (crop, crop)], "reflect"
                )
                for dy in range(2 * crop + 1):
                    for dx in range(2 * crop + 1):
                        window = padded[:, dy : dy + 6, dx : dx + 6]
                        windows[window.astype(np.float32).tobytes()] = dy, dx, mirrored
            found.add(windows[out.astype(np.float32).tobytes()])  # a KeyError: no window at all
        assert len(found) == (2 * crop + 1) ** 2 * (1 + flip)  # every window is drawn

    def test_mirrors_half_of_the_images(self):
        images = self.images(count=1000)
        out = augment(images, Recipe(1, crop=0), self.seeded())
        share = (out != images).flatten(1).any(1).double().mean()
        assert 0.45 < share < 0.55

    def test_uses_only_its_generator(self):
        images, recipe = self.images(count=50), Recipe(1)
        torch.manual_seed(1)
        once = augment(images, recipe, self.seeded(5))
        torch.manual_seed(2)
        assert torch.equal(augment(images, recipe, self.seeded(5)), once)
        assert not torch.equal(augment(images, recipe, self.seeded(6)), once)

    def test_without_crop_and_flip_changes_nothing(self):
        images = self.images(count=5)
        out = augment(images, Recipe(1, crop=0, flip=False), self.seeded())
        assert out.dtype == torch.uint8 and torch.equal(out, images)

    def test_leaves_its_argument(self):
        images = self.images(count=20)
        before = images.clone()
        assert augment(images, Recipe(1, crop=2), self.seeded()).dtype == torch.uint8
        assert torch.equal(images, before)


class TestFit:
    def test_is_reproducible_bit_for_bit(self, digits):
        (one, history), (again, repeated) = fitted(digits, QUICK), fitted(digits, QUICK)
        other, _ = fitted(digits, QUICK, seed=1)
        assert same_bits(one, again) and without_seconds(history) == without_seconds(repeated)
        assert not same_bits(one, other)

    def test_with_dropout_does_not_depend_on_the_global_generator(self, digits):
        """Dropout uses the global generator, whose state differs in a resumed run."""
        results = []
        for state in (1, 2):
            network = linear_network()
            network.insert(0, nn.Dropout(0.5))
            torch.manual_seed(state)
            fit(network, digits, QUICK)
            results.append(network)
        assert same_bits(*results)

    def test_shows_each_image_at_most_once_an_epoch_in_a_new_order(self, digits):
        network, shown = small_network(), []
        at_each_forward(network, lambda _, images: shown.append(images.clone()))
        fit(network, digits, replace(STILL, epochs=2))
        whole = digits.normalize(digits.train.images).flatten(1)
        rows = [int((whole == image).all(1).nonzero()) for images in shown for image in images.flatten(1)]
        epochs = rows[: STEPS * 20], rows[STEPS * 20 :]
        assert len(epochs[1]) == STEPS * 20
        assert all(len(set(epoch)) == STEPS * 20 for epoch in epochs)
        assert epochs[0] != epochs[1]

    def test_reports_loss_and_accuracy_of_the_training_images(self, digits):
        whole = replace(digits, train=digits.train.take(STEPS * 20))
        network = linear_network()
        [row] = fit(network, whole, replace(STILL, label_smoothing=0.1))
        logits = network(whole.normalize(whole.train.images)).detach()
        assert row["loss"] == pytest.approx(
            F.cross_entropy(logits, whole.train.labels, label_smoothing=0.1).item(), rel=1e-5
        )
        assert row["accuracy"] == pytest.approx(evaluate(network, whole.batches(whole.train)))
        assert row["epoch"] == 0 and row["seconds"] > 0

    def test_learns(self, digits):
        network, history = fitted(digits, replace(QUICK, epochs=20))
        assert history[-1]["loss"] < 0.7 * history[0]["loss"]
        assert evaluate(network, digits.batches(digits.train)) > 50

    def test_with_no_epoch_changes_nothing(self, digits):
        network, history = fitted(digits, replace(QUICK, epochs=0))
        assert history == [] and same_bits(network, small_network())

    def test_applies_weight_decay_to_weights_only(self, digits):
        """In one step without momentum, the decay adds -lr * decay * w."""
        lr, decay = 0.1, 0.5
        one_step = Recipe(epochs=1, batch_size=60, lr=lr, momentum=0, weight_decay=0, **CONSTANT)
        plain, decayed = small_network(), small_network()
        before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
        fit(plain, digits, one_step)
        fit(decayed, digits, replace(one_step, weight_decay=decay))
        for (name, free), pulled in zip(plain.named_parameters(), decayed.parameters()):
            expected = -lr * decay * before[name] if free.ndim > 1 else torch.zeros_like(free)
            torch.testing.assert_close(pulled - free, expected, rtol=1e-4, atol=1e-6, msg=name)
        assert sum(parameter.ndim > 1 for parameter in plain.parameters()) == 2

    def test_refuses_fewer_images_than_a_batch(self, digits):
        with pytest.raises(ValueError, match="digits10: 65 training images do not fill a batch of 66"):
            fitted(digits, replace(QUICK, batch_size=66))

    def test_stops_at_a_loss_that_is_not_finite(self, digits, tmp_path):
        checkpoint = tmp_path / "fit.ckpt"
        with pytest.raises(FloatingPointError, match="mine.*epoch 1.*learning rate"):
            fitted(digits, replace(QUICK, lr=1e30, **CONSTANT), checkpoint=checkpoint, description="mine")
        assert not checkpoint.exists()


class TestMixing:
    """timm mixes each image with the one at the opposite place of its batch."""

    MIXED = replace(STILL, mixup=0.4, cutmix=1.0)

    def shown(self, digits, recipe, seed=0):
        """The batches that a network is trained on, and the history."""
        network, shown = linear_network(), []
        at_each_forward(network, lambda _, images: shown.append(images.clone()))
        return shown, fit(network, digits, recipe, seed)

    @pytest.mark.parametrize("recipe", [replace(STILL, mixup=0.4), replace(STILL, cutmix=1.0)], ids=["mixup", "cutmix"])
    def test_of_images(self, digits, recipe):
        plain, mixed = self.shown(digits, STILL)[0], self.shown(digits, recipe)[0]
        for before, after in zip(plain, mixed, strict=True):
            other = before.flip(0)
            differs = before != other
            share = ((after - other) / (before - other))[differs]  # of the image itself in each pixel
            if recipe.mixup:
                torch.testing.assert_close(share, share[:1].expand_as(share), rtol=1e-2, atol=1e-2)
            else:
                assert ((share == 0) | (share == 1)).all()
            torch.testing.assert_close(after[~differs], before[~differs])
        assert any(not before.equal(after) for before, after in zip(plain, mixed))

    def test_of_labels(self, digits):
        """The loss is that of the shares of both images, with smoothed labels."""
        recipe = replace(STILL, mixup=0.4, label_smoothing=0.1, precision="float32")
        images, history = self.shown(digits, recipe)
        mix, labels = Mixup(0.4, label_smoothing=0.1, num_classes=10), []
        order = torch.randperm(65, generator=torch.Generator().manual_seed(epoch_seed(0, 0)))[:60]
        np.random.seed([epoch_seed(0, 0), 0])
        for rows in order.view(STEPS, 20):
            labels.append(mix(digits.normalize(digits.train.images[rows]), digits.train.labels[rows])[1])
        logits = linear_network()(torch.cat(images)).detach()
        assert history[0]["loss"] == pytest.approx(F.cross_entropy(logits, torch.cat(labels)).item(), rel=1e-5)
        right = (logits.argmax(1) == torch.cat(labels).argmax(1)).double().mean()
        assert history[0]["accuracy"] == pytest.approx(100 * right.item())

    def test_depends_on_the_seed_alone(self, digits):
        np.random.seed(1)
        once = self.shown(digits, self.MIXED)[0]
        state = np.random.random()
        np.random.seed(1)
        assert np.random.random() == state  # the caller's random numbers are not used up
        again, other = self.shown(digits, self.MIXED)[0], self.shown(digits, self.MIXED, seed=1)[0]
        assert all(one.equal(two) for one, two in zip(once, again))
        assert not any(one.equal(two) for one, two in zip(once, other))

    def test_needs_pairs(self, digits):
        with pytest.raises(ValueError, match="even number of images per batch and process, got 15"):
            self.shown(digits, replace(self.MIXED, batch_size=15))


class TestAverage:
    def test_of_constant_weights_equals_the_weights(self, digits):
        network = linear_network()
        fit(network, digits, replace(STILL, epochs=3, ema_decay=0.9))
        assert same_bits(network, linear_network())

    def test_equals_the_documented_average(self, digits):
        """From the third step on (n = 1, 2, ...) the decay is min(0.5, 1 - (1 + n)^(-2/3)); before it, 0."""
        recipe = Recipe(epochs=2, batch_size=20, lr=0.05, **CONSTANT)
        plain, weights = linear_network(), []
        at_each_forward(plain, lambda *_: weights.append(plain[1].weight.detach().double().clone()))
        fit(plain, digits, recipe)
        weights = [*weights[1:], plain[1].weight.detach().double()]  # after each of 2 STEPS steps
        average = weights[1]
        for n, weight in enumerate(weights[2:], 1):
            decay = min(0.5, 1 - (1 + n) ** (-2 / 3))
            average = decay * average + (1 - decay) * weight
        averaged = linear_network()
        fit(averaged, digits, replace(recipe, ema_decay=0.5))
        torch.testing.assert_close(averaged[1].weight.detach().double(), average, rtol=1e-5, atol=1e-7)
        assert (average - weights[-1]).abs().max() > 1e-4  # the test tells the average from the last weights


class TestCheckpoint:
    @pytest.mark.parametrize(
        "recipe",
        [
            QUICK,
            replace(QUICK, ema_decay=0.5),
            replace(QUICK, schedule="multistep", milestones=(1, 2), momentum=0),
            replace(QUICK, schedule="cosine", mixup=0.2, cutmix=1.0),
        ],
        ids=["one_cycle", "ema", "multistep", "cosine, mixed"],
    )
    def test_resumes_as_if_never_interrupted(self, digits, tmp_path, recipe):
        whole, history = fitted(digits, recipe)
        checkpoint, broken = tmp_path / "fit.ckpt", small_network()

        def interrupt(seen, _):
            if seen == STEPS + 2:
                raise KeyboardInterrupt

        at_each_forward(broken, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(broken, digits, recipe, checkpoint=checkpoint)
        resumed, steps = small_network(seed=99), []  # other initial weights, which the checkpoint replaces
        at_each_forward(resumed, lambda seen, _: steps.append(seen))
        resumed_history = fit(resumed, digits, recipe, checkpoint=checkpoint)
        assert len(steps) == 2 * STEPS
        assert same_bits(resumed, whole)
        assert without_seconds(resumed_history) == without_seconds(history)

    def test_of_a_finished_fit_contains_the_result(self, digits, tmp_path):
        recipe, checkpoint = replace(QUICK, ema_decay=0.5), tmp_path / "fit.ckpt"
        whole, _ = fitted(digits, recipe, checkpoint=checkpoint)
        again = small_network(seed=99)
        at_each_forward(again, lambda *_: pytest.fail("trained again"))
        history = fit(again, digits, recipe, checkpoint=checkpoint)
        assert same_bits(again, whole) and len(history) == 3

    @pytest.fixture
    def checkpoint(self, digits, tmp_path):
        fitted(digits, replace(QUICK, epochs=1), checkpoint=tmp_path / "fit.ckpt")
        return tmp_path / "fit.ckpt"

    def refused(self, digits, checkpoint, recipe=None, seed=0, network=None):
        """The error names the checkpoint and leaves it unchanged."""
        content = checkpoint.read_bytes()
        with pytest.raises(ValueError, match=str(checkpoint)):
            fit(network or small_network(), digits, recipe or replace(QUICK, epochs=1), seed, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == content

    def test_of_another_fit(self, digits, checkpoint):
        self.refused(digits, checkpoint, recipe=QUICK)
        self.refused(digits, checkpoint, seed=1)
        self.refused(digits, checkpoint, network=linear_network())
        self.refused(replace(digits, train=digits.train.take(40)), checkpoint)

    @pytest.mark.parametrize("left", [0, 0.5, 0.999])
    def test_that_was_cut_off(self, digits, checkpoint, left):
        content = checkpoint.read_bytes()
        checkpoint.write_bytes(content[: int(left * len(content))])
        self.refused(digits, checkpoint)

    @pytest.mark.parametrize("content", [dict(weights=1), [1, 2]], ids=["dict", "list"])
    def test_that_something_else_wrote(self, digits, checkpoint, content):
        torch.save(content, checkpoint)
        self.refused(digits, checkpoint)

    def test_is_never_executed(self, digits, checkpoint, tmp_path):
        trap = Trap(tmp_path / "executed")
        for write in (lambda: torch.save(trap, checkpoint), lambda: checkpoint.write_bytes(pickle.dumps(trap))):
            write()
            self.refused(digits, checkpoint)
            assert not trap.path.exists()


class TestPart:
    """Only the part changes; everything else is in evaluation mode."""

    def network(self):
        network = small_network()
        network.insert(4, nn.Dropout(0.5))
        return network

    @pytest.mark.parametrize("ema_decay", [None, 0.5])
    def test_is_the_only_thing_that_changes(self, digits, ema_decay):
        network = self.network()
        fit(network, digits, replace(QUICK, ema_decay=ema_decay), part="5")
        before, after = self.network().state_dict(), network.state_dict()
        assert {name for name in after if not after[name].equal(before[name])} == {"5.weight", "5.bias"}
        assert all(parameter.requires_grad for parameter in network.parameters())

    def test_receives_features_of_evaluation_mode(self, digits):
        """The features come without dropout and without batch statistics."""
        network, seen = self.network(), []
        expected = self.network().eval()
        network[5].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        network[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        fit(network, digits, replace(QUICK, epochs=1, precision="float32"), part="5")
        images, features = seen[0::2], seen[1::2]
        assert len(features) == STEPS
        for batch, feature in zip(images, features):
            torch.testing.assert_close(expected[:5](batch), feature)

    def test_leaves_frozen_parameters_frozen(self, digits):
        network = self.network()
        network[0].weight.requires_grad_(False)
        fit(network, digits, replace(QUICK, epochs=1), part="5")
        assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == ["0.weight"]

    def test_of_another_checkpoint(self, digits, tmp_path):
        fit(self.network(), digits, replace(QUICK, epochs=1), checkpoint=tmp_path / "fit.ckpt")
        with pytest.raises(ValueError, match="fit.ckpt"):
            fit(self.network(), digits, replace(QUICK, epochs=1), checkpoint=tmp_path / "fit.ckpt", part="5")


def test_float32_is_never_tf32(digits, tf32_allowed):
    """Neither forward nor backward; cuDNN's convolutions use TF32 by default."""
    seen, convolutions = [], torch.backends.cudnn.conv
    network = small_network()
    network[0].register_forward_hook(lambda *_: seen.append(convolutions.fp32_precision))
    network[0].weight.register_hook(lambda gradient: seen.append(convolutions.fp32_precision))
    fit(network, digits, replace(QUICK, epochs=1, precision="float32"), progress=False)
    assert seen == ["ieee"] * 2 * STEPS and convolutions.fp32_precision == "tf32"


def test_cudnn_benchmarks_convolutions_during_a_fit(digits):
    """cuDNN benchmarks its algorithms during a fit; afterwards the setting is restored, also after an error."""
    seen, network = [], small_network()
    network[0].register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    fit(network, digits, replace(QUICK, epochs=1), progress=False)
    assert seen == [True] * STEPS and not torch.backends.cudnn.benchmark
    with pytest.raises(FloatingPointError):
        fit(network, digits, replace(QUICK, epochs=1, lr=1e30), progress=False)
    assert not torch.backends.cudnn.benchmark


def test_checkpoints_are_saved_only_if_they_save_time(digits, tmp_path, monkeypatch):
    """After the first epoch, save only if much time would be lost, at a deadline, and at the end."""
    saved, options = [], dict(recipe=replace(QUICK, epochs=6), checkpoint=tmp_path / "fit.ckpt")
    monkeypatch.setattr("urank.training.fitting.write_checkpoint", lambda _, state: saved.append(len(state["history"])))
    fitted(digits, **options)
    assert saved == [1, 6]
    over = iter([False, False, True])
    with monkeypatch.context() as patch, pytest.raises(OutOfTime, match="3 of 6 epochs left"):
        patch.setattr("urank.training.fitting.is_over", lambda *_: next(over))
        fitted(digits, **options)
    assert saved[2:] == [1, 3]
    monkeypatch.setattr("urank.training.fitting.SAVE_INTERVAL", -1.0)
    fitted(digits, **options)
    assert saved[4:] == [1, 2, 3, 4, 5, 6]


class TestDeadline:
    def test_stops_after_an_epoch_and_can_be_resumed(self, digits, tmp_path):
        whole, history = fitted(digits, QUICK)
        network, checkpoint = small_network(), tmp_path / "fit.ckpt"
        for left in (2, 1):
            with pytest.raises(OutOfTime, match=f"training has {left} of 3 epochs left"):
                fit(network, digits, QUICK, checkpoint=checkpoint, deadline=time.monotonic())
        rest = fit(network, digits, QUICK, checkpoint=checkpoint, deadline=time.monotonic())
        assert same_bits(network, whole) and without_seconds(rest) == without_seconds(history)

    def test_stops_before_an_epoch_that_would_miss_it(self, digits, monkeypatch):
        """The first epoch takes ten seconds; five are left."""
        clock = iter([0.0, 10.0])
        monkeypatch.setattr("urank.training.fitting.time.perf_counter", lambda: next(clock))
        with pytest.raises(OutOfTime, match="training has 2 of 3 epochs left"):
            fitted(digits, QUICK, deadline=time.monotonic() + 5, progress=False)


def test_a_compiled_fit_is_the_same_and_can_be_resumed_without_compiling(digits, tmp_path, monkeypatch):
    """Without code generation, which takes a minute and is not ours."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    recipe, checkpoint = replace(QUICK, epochs=2, ema_decay=0.5), tmp_path / "fit.ckpt"
    plain, history = fitted(digits, recipe)
    with pytest.raises(OutOfTime):
        fitted(digits, replace(recipe, compile=True), checkpoint=checkpoint, deadline=time.monotonic())
    compiled, rest = fitted(digits, recipe, checkpoint=checkpoint)
    assert [row["loss"] for row in rest] == pytest.approx([row["loss"] for row in history], rel=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


class TestPrecision:
    def test_bfloat16_on_the_cpu(self, digits):
        types = []
        network = small_network()
        network[4].register_forward_hook(lambda layer, inputs, output: types.append(output.dtype))
        history = fit(network, digits, replace(QUICK, precision="bfloat16"))
        exact, exact_history = fitted(digits, replace(QUICK, precision="float32"))
        assert set(types) == {torch.bfloat16}
        assert {row["precision"] for row in history} == {"bfloat16"}
        assert {row["precision"] for row in exact_history} == {"float32"}
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        assert history[-1]["loss"] == pytest.approx(exact_history[-1]["loss"], rel=0.1)
        assert not same_bits(network, exact)


def test_a_fit_leaves_the_random_state_of_the_caller(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    network = small_network()
    torch.manual_seed(5)
    fit(network, digits, replace(QUICK, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("progress", [True, False])
def test_a_progress_bar_is_optional(digits, capsys, progress):
    fit(small_network(), digits, replace(QUICK, epochs=1), description="some network", progress=progress)
    assert ("some network 1/1" in capsys.readouterr().err) == progress


def test_a_crop_larger_than_the_image_is_refused(digits):
    with pytest.raises(ValueError, match="smaller than the images"):
        fit(small_network(), digits, replace(QUICK, crop=32))


class TestOptimizer:
    def test_adamw_is_adamw(self):
        optimizer = make_optimizer(small_network(), replace(QUICK, optimizer="adamw", weight_decay=0.1))
        assert type(optimizer) is torch.optim.AdamW
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.1]

    def test_adamw_learns(self, digits):
        _, history = fitted(digits, replace(QUICK, optimizer="adamw", lr=0.01, epochs=4))
        assert history[-1]["loss"] < history[0]["loss"]


def test_a_checkpoint_without_an_optimizer_name_can_be_resumed(digits, tmp_path):
    path = tmp_path / "fit.ckpt"
    fit(small_network(), digits, QUICK, checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["identity"]["recipe"]["optimizer"]
    torch.save(state, path)
    network = small_network()
    assert len(fit(network, digits, QUICK, checkpoint=path)) == QUICK.epochs
    with pytest.raises(ValueError, match="delete it to start again"):
        fit(small_network(), digits, replace(QUICK, optimizer="adamw"), checkpoint=path)
