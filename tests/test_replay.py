import copy
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import Residual, small_cnn
from torch import nn

import urank  # noqa: F401  before torchvision and timm: it declares torchvision's operators where they do not load
from urank.calibration import accumulate_grams
from urank.layers import evaluating, matrix_layers
from urank.models import create
from urank.search.replay import Replay, _Cut, in_order, is_data, timeline

os.environ["HF_HUB_OFFLINE"] = "1"


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it calls them."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(6, 3), nn.Linear(5, 6), nn.Linear(12, 5)

    def forward(self, images):
        return self.last(self.middle(self.first(images.flatten(1)).tanh()).relu())


class SharedReLU(nn.Module):
    """One in-place ReLU behind every layer, and a skip connection around the second."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, images):
        x = self.relu(self.conv1(images))
        x = x + self.relu(self.conv2(x))
        return self.fc(self.relu(x).mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 7)

    def forward(self, x):
        return self.a(x).relu(), {"b": self.b(x), "nothing": None}


class Tuple(nn.Module):
    """A module that returns tensors inside a tuple inside a dictionary; one of them is read late, one never."""

    def __init__(self):
        super().__init__()
        self.pair, self.middle, self.last = Pair(), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, images):
        a, rest = self.pair(images.flatten(1))
        return self.last(self.middle(a) + rest["b"])


class Twice(nn.Module):
    """The same normalisation twice before the last layer and once between: its results come in the order of calls."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, images):
        x = self.norm(images.flatten(1))
        y = self.norm(self.fc1(x))
        return self.fc3(self.fc2(y) * x)


class Inception(nn.Module):
    """Branches of the input that are joined at the end: much of what an early layer returned is read late."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(3, 4, k, padding=k // 2), nn.ReLU(True)) for k in (1, 3, 5))
        self.join = nn.Conv2d(12, 3, 1)

    def forward(self, images):
        return self.join(torch.cat([self.a(images), self.b(images), self.c(images)], 1)).mean((2, 3))


def resnet18():
    import torchvision

    return torchvision.models.resnet18(num_classes=5)


def vision_transformer():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)


# Builder, image shape, and every how many layers to cut.
NETWORKS = {
    "vgg11": (lambda: create("vgg11", width=0.125), (3, 32, 32), 1),
    "cnn": (small_cnn, (3, 8, 8), 1),
    "residual": (Residual, (3, 8, 8), 1),
    "backwards": (Backwards, (3, 2, 2), 1),
    "shared relu": (SharedReLU, (3, 6, 6), 1),
    "tuple": (Tuple, (3, 2, 2), 1),
    "twice": (Twice, (3, 2, 2), 1),
    "inception": (Inception, (3, 6, 6), 1),
    "resnet18": (resnet18, (3, 16, 16), 3),
    "vit": (vision_transformer, (3, 32, 32), 2),
}


def random_batches(shape, sizes=(3, 3, 2)):
    return [(torch.randn(size, *shape), torch.arange(size)) for size in sizes]


def logits_of(model, batches):
    """The plain forward pass, on a copy that no replay has touched."""
    with evaluating(model):
        return [model(images) for images, _ in batches]


def replayed(replay):
    return [logits for logits, _ in replay]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def forward_order(model, shape):
    with evaluating(model):
        spans = timeline(model, torch.zeros(1, *shape)).calls
    layers = matrix_layers(model).values()
    return sorted((layer for layer in layers if layer in spans), key=lambda layer: spans[layer])


def perturb(layer):
    with torch.no_grad():
        layer.weight.mul_(0.9)
        layer.weight += 0.1 * layer.weight.std() * torch.randn_like(layer.weight)


def assert_unpatched(model):
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def kept_bytes(replay):
    tensors = [t for results in replay._kept for calls in results.values() for t in leaves(calls) if is_data(t)]
    return sum(tensor.nbytes for tensor in tensors)


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_plain_forward_pass_bit_for_bit(name):
    """As a search uses it: layer after layer, each changed several times and left changed."""
    build, shape, step = NETWORKS[name]
    model, batches = build().eval(), random_batches(shape)
    layers = forward_order(model, shape)
    assert len(layers) >= 3
    with evaluating(model):
        replay = Replay(model, batches)
        assert same(replayed(replay), logits_of(model, batches))
        for layer in layers[::step]:
            replay.advance(layer)
            assert replay.exact
            unchanged = replayed(replay)
            assert same(unchanged, logits_of(model, batches))
            assert same(replayed(replay), unchanged)
            perturb(layer)
            changed = replayed(replay)
            assert not same(changed, unchanged)
            assert same(changed, logits_of(model, batches))
            perturb(layer)
            assert same(replayed(replay), logits_of(model, batches))
    assert_unpatched(model)


def test_later_layers_may_change_too():
    model, batches = Residual().eval(), random_batches((3, 8, 8))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.blocks[0].conv2)
        for layer in (model.head, model.blocks[1].conv1, model.blocks[0].conv2):
            perturb(layer)
            assert same(replayed(replay), logits_of(model, batches))


def test_hands_out_the_labels_of_each_batch():
    model, batches = Backwards().eval(), random_batches((3, 2, 2))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.middle)
        assert all(torch.equal(found, labels) for (_, found), (_, labels) in zip(replay, batches, strict=True))


class Counting(nn.Linear):
    """A linear layer that counts how often it computes."""

    computed = 0

    def forward(self, x):
        self.computed += 1
        return super().forward(x)


def counted_network():
    return nn.Sequential(
        nn.Sequential(Counting(6, 8), nn.ReLU(True)), Counting(8, 8), nn.ReLU(True), Counting(8, 7), Counting(7, 3)
    )


def computed(model):
    counts = [module.computed for module in model.modules() if isinstance(module, Counting)]
    for module in model.modules():
        if isinstance(module, Counting):
            module.computed = 0
    return counts


def test_skips_what_runs_before_the_layer():
    model, batches = counted_network().eval(), random_batches((6,))
    with evaluating(model):
        replay = Replay(model, batches)
        replayed(replay)
        assert computed(model) == [3, 3, 3, 3]
        for layer, expected in ((model[1], [0, 3, 3, 3]), (model[3], [0, 0, 3, 3]), (model[4], [0, 0, 0, 3])):
            replay.advance(layer)
            computed(model)
            replayed(replay)
            assert computed(model) == expected


def test_advances_from_where_it_was():
    """What a later layer needs is computed from what was kept for the earlier one; the check alone starts over."""
    model, batches = counted_network().eval(), random_batches((6,), [2] * 10)
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model[3])
        computed(model)
        replay.advance(model[4])
        first, second, third, last = computed(model)
    assert first == second < 6
    assert third == first + 10 and last < 8


class Regions(nn.Module):
    """Takes images apart into four regions each, as window attention does: what is kept has four rows an image."""

    def __init__(self):
        super().__init__()
        self.apart, self.first, self.last = nn.Unflatten(1, (4, 2)), Counting(2, 3), Counting(12, 5)

    def forward(self, x):
        regions = self.first(self.apart(x).flatten(0, 1))
        return self.last(regions.view(len(x), 12))


class Temperature(nn.Module):
    """One number for all images, read after the layers."""

    def forward(self, _):
        return torch.tensor(2.0)


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature, self.first, self.last = Temperature(), Counting(6, 3), Counting(3, 5)

    def forward(self, x):
        temperature = self.temperature(x)
        return self.last(self.first(x)) / temperature


def reordered(replay, order, sizes):
    images, labels = (torch.cat(parts)[order] for parts in zip(*replay.batches))
    batches = list(zip(images.split(sizes), labels.split(sizes)))
    replay.reorder(batches, order, sizes)
    return batches


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 2), (1, 3, 2), (4, 1, 1)])
def test_rows_of_all_parts_in_another_order(shape, memory_format):
    whole, order = torch.randn(9, *shape).contiguous(memory_format=memory_format), torch.randperm(9)
    for parts in ([whole], whole.split([2, 4, 3])):
        for chosen in (order, order[:5]):
            found = in_order(parts, chosen)
            assert found.equal(whole[chosen])
            assert found.stride() == whole.stride()


@pytest.mark.parametrize("name", NETWORKS)
def test_goes_on_with_the_images_in_another_order(name):
    build, shape, _ = NETWORKS[name]
    model = build().eval()
    sizes, layers = [1, 3, 2], forward_order(model, shape)
    with evaluating(model):
        replay = Replay(model, random_batches(shape, sizes))
        for layer in layers[:: max(1, len(layers) // 4)]:
            replay.advance(layer)
            batches = reordered(replay, torch.randperm(6), sizes)
            perturb(layer)
            for found, expected in zip(replayed(replay), logits_of(model, batches), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_some_images_are_answered_as_all_of_them_are(name, share):
    build, shape, _ = NETWORKS[name]
    model, sizes, marks = build().eval(), [1, 3, 2, 2], torch.tensor([False, True, True, False, False, True])
    layers, batches = forward_order(model, shape), random_batches(shape, [2, *sizes])
    with evaluating(model):
        unlimited = Replay(model, batches)
        unlimited.advance(layers[-1])
        replay = Replay(model, batches, memory=int(share * kept_bytes(unlimited)))
        replay.advance(layers[-1])
        perturb(layers[-1])
        expected = torch.cat(logits_of(model, batches)[1:4])[marks]
        found, labels = zip(*replay.chosen(marks, first=1, together=2))
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
        assert torch.cat(labels).tolist() == torch.cat([labels for _, labels in batches[1:4]])[marks].tolist()
        assert all(len(part) >= 2 for part in labels[:-1]) or share == 0.5  # what is kept and what is not part here


class Telling(nn.Module):
    """Also returns what `more` says of its input."""

    def __init__(self, more):
        super().__init__()
        self.fc, self.more = Counting(6, 8), more

    def forward(self, x):
        return self.fc(x), self.more(x)


class Numbering(nn.Module):
    """Its stem also returns how many images there are."""

    def __init__(self, number=int):
        super().__init__()
        self.stem, self.last = Telling(lambda x: number(len(x))), Counting(8, 3)

    def forward(self, x):
        x, n = self.stem(x)
        return self.last(x.view(int(n), 8))


class Positions(nn.Module):
    """Its stem also returns where in the batch the images are."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = Telling(lambda x: torch.arange(len(x))), Counting(8, 3)

    def forward(self, x):
        x, places = self.stem(x)
        return self.last(x[places])


class SequenceFirst(nn.Module):
    """Keeps tokens, images and features in this order."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Counting(2, 4), Counting(12, 3)

    def forward(self, x):
        tokens = self.first(x.view(len(x), 3, 2).transpose(0, 1))
        return self.last(tokens.transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("build", "layer", "expected"),
    [
        (counted_network, "3", [0, 0, 1, 1]),
        (Regions, "last", [1, 1]),  # not one row an image
        (Numbering, "last", [1, 1]),
        (lambda: Numbering(float), "last", [1, 1]),
        (Positions, "last", [1, 1]),
        (SequenceFirst, "last", [1, 1]),
    ],
)
def test_some_images_are_replayed_where_that_can_be_done(build, layer, expected):
    model, batches = build().eval(), random_batches((8,) if build is Regions else (6,), [3, 3])
    marks = torch.tensor([True, False, True, True, False, False])
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.get_submodule(layer))
        computed(model)
        [(found, _)] = replay.chosen(marks, first=0, together=256)
        assert computed(model) == expected
        torch.testing.assert_close(found, torch.cat(logits_of(model, batches))[marks])


@pytest.mark.parametrize(
    ("build", "layer", "memory", "expected"),
    [
        (counted_network, "3", 2 * 6 * 8 * 4, [0, 0, 3, 3]),
        (counted_network, "3", 2 * 6 * 8 * 4 - 1, [3, 3, 3, 3]),  # no room to sort in
        (Regions, "last", 1 << 20, [3, 3]),  # not one row an image
        (Tempered, "last", 1 << 20, [3, 3]),
    ],
)
def test_what_is_kept_is_sorted_where_that_can_be_done(build, layer, memory, expected):
    model, sizes = build().eval(), [1, 3, 2]
    shape = (8,) if build is Regions else (6,)
    with evaluating(model):
        replay = Replay(model, random_batches(shape, sizes), memory)
        replay.advance(model.get_submodule(layer))
        assert replay._kept
        batches = reordered(replay, torch.randperm(6), sizes)
        computed(model)
        found = replayed(replay)
        assert computed(model) == expected
        replay.advance(model.get_submodule(layer))
        assert replay._kept
        for again in (found, replayed(replay)):
            for logits, whole in zip(again, logits_of(model, batches), strict=True):
                torch.testing.assert_close(logits, whole)


class Rectified(nn.Module):
    """Changes in place what one of two modules returned, where it is positive on the first batch."""

    def __init__(self):
        super().__init__()
        self.plain, self.bent, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.plain(x) + self.bent(x).view(-1, 5).relu_())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_only_what_is_changed_in_place_is_copied(guard):
    model, batches = Rectified().eval(), random_batches((6,))
    model.bent.bias.data += 100
    batches[0][0].zero_()
    handed = {}
    with guard(), evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.head)
        for layer in (model.plain, model.bent):
            layer.register_forward_hook(lambda layer, _, output: handed.setdefault(layer, []).append(output))
        first, again = replayed(replay), replayed(replay)
    assert same(first, again) and same(first, logits_of(model, batches)) and replay.exact
    copied = {layer: outputs[0] is not outputs[len(batches)] for layer, outputs in handed.items()}
    assert copied == {model.plain: guard is torch.inference_mode, model.bent: True}


def test_keeps_one_activation_where_only_one_is_read():
    model, batches = create("vgg11", width=0.125).eval(), random_batches((3, 32, 32))
    with evaluating(model):
        replay = Replay(model, batches)
        for name in ("features.4", "features.18", "classifier"):
            layer, inputs = model.get_submodule(name), []
            handle = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].numel() * 4))
            logits_of(model, batches)
            handle.remove()
            replay.advance(layer)
            assert kept_bytes(replay) == sum(inputs)


def test_keeps_of_a_tuple_what_is_read():
    model, batches = Tuple().eval(), random_batches((3, 2, 2))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.last)
        # Of `pair` only the 7 numbers that are added late, and the 7 of `middle`; the 5 that `middle` read are gone.
        assert kept_bytes(replay) == 8 * (7 + 7) * 4


@pytest.mark.parametrize("name", ["cnn", "residual", "vgg11", "tuple"])
@pytest.mark.parametrize("share", [0, 0.4, 0.7])
def test_keeps_no_more_than_its_memory(name, share):
    build, shape, _ = NETWORKS[name]
    model, batches = build().eval(), random_batches(shape, (2,) * 5)
    layers = forward_order(model, shape)
    with evaluating(model):
        unlimited = Replay(model, batches)
        unlimited.advance(layers[1])
        bound = int(share * kept_bytes(unlimited))
        replay, kept = Replay(model, batches, memory=bound), []
        for layer in layers[1:]:
            replay.advance(layer)
            assert kept_bytes(replay) <= bound
            kept.append(len(replay._kept))
            perturb(layer)
            assert same(replayed(replay), logits_of(model, batches))
            assert same(replayed(replay), logits_of(model, batches))
    assert kept[0] == int(5 * share)


def test_stays_within_its_memory_while_it_advances(monkeypatch):
    """A layer that reads twelve numbers an image after one that reads three: old and new together must fit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 12), nn.Linear(12, 3)).eval()
    with evaluating(model):
        replay = Replay(model, random_batches((3, 2, 2), [2] * 5), memory=5 * 2 * 3 * 4 + 2 * 12 * 4)
        replay.advance(model[2])
        assert kept_bytes(replay) == 5 * 2 * 3 * 4
        old, held = replay._kept, []
        record = _Cut.record

        def recorded(cut, images):
            results = record(cut, images)
            held.append(sum(call.nbytes for kept in old for calls in kept.values() for call in calls if is_data(call)))
            return results

        monkeypatch.setattr(_Cut, "record", recorded)
        replay.advance(model[3])
        # two for the check of the cut; then each batch takes eight times three numbers and the old ones make room
        assert held == [120, 120, 120, 96, 24]
        assert kept_bytes(replay) == 2 * 2 * 12 * 4


def test_stays_within_its_memory_while_it_advances_with_sorted_images(monkeypatch):
    """What was sorted is one tensor: it takes its place until the last of the old batches is superseded."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 12), nn.Linear(12, 3)).eval()
    sizes = [2] * 5
    with evaluating(model):
        replay = Replay(model, random_batches((3, 2, 2), sizes), memory=2 * 5 * 2 * 3 * 4 + 2 * 12 * 4)
        replay.advance(model[2])
        reordered(replay, torch.randperm(10), sizes)
        record, held = _Cut.record, []

        def recorded(cut, images):
            results = record(cut, images)
            tensors = [leaf for kept in replay._kept for leaf in leaves(list(kept.values())) if is_data(leaf)]
            storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in tensors}
            held.append(sum(storage.nbytes() for storage in storages.values()))
            return results

        monkeypatch.setattr(_Cut, "record", recorded)
        replay.advance(model[3])
        # two for the check of the cut; the third batch finds no room
        assert held == [120] * 5
        assert kept_bytes(replay) == 2 * 2 * 12 * 4
        assert 120 + kept_bytes(replay) <= replay.memory


def test_a_module_called_by_its_forward_as_well_is_run_whole():
    class Unhooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, images):
            return self.last(self.first.forward(self.first(images.flatten(1))))

    model, batches = Unhooked().eval(), random_batches((3, 2, 2))
    with evaluating(model):
        replay = Replay(model, batches)
        with pytest.warns(UserWarning, match="Unhooked does not reproduce"):
            replay.advance(model.last)
        assert not replay.exact
        assert same(replayed(replay), logits_of(model, batches))


class TwoDilations(nn.Module):
    """Reads a convolution's weight itself before it calls the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        wide = self.first(F.conv2d(images, self.conv.weight, self.conv.bias, padding=2, dilation=2))
        return self.head((wide.relu() + self.last(self.conv(images)).relu()).mean((2, 3)))


class TurnedAround(nn.Module):
    """Multiplies by a layer's weight, transposed, before it calls the layer."""

    def __init__(self):
        super().__init__()
        self.before, self.conv = nn.Linear(108, 108), nn.Linear(108, 3)
        self.between = nn.LayerNorm(3)

    def forward(self, images):
        x = self.before(images.flatten(1))
        return self.between(x @ self.conv.weight.T) + self.conv(x)


@pytest.mark.parametrize("network", [TwoDilations, TurnedAround])
def test_what_is_computed_from_a_weight_before_its_layer_is_called_is_computed_again(network):
    model, batches = network().eval(), random_batches((3, 6, 6))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.conv)
        perturb(model.conv)
        assert replay.exact and same(replayed(replay), logits_of(model, batches))


class Box:
    def __init__(self, x):
        self.x = x


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 6)

    def forward(self, x):
        return Box(self.fc(x.flatten(1)))


class Unboxing(nn.Module):
    """Its stem returns an object of its own, which is then changed."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = Boxed(), nn.Linear(6, 3)

    def forward(self, x):
        box = self.stem(x)
        box.x += 1
        return self.head(box.x)


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x, seen):
        seen.append(self.fc(x))


class Collecting(nn.Module):
    """Its blocks return nothing: they append to a list."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Adding(), Adding()]), nn.Linear(8, 3)

    def forward(self, x):
        seen = []
        for block in self.blocks:
            block(x.flatten(1), seen)
        return self.head(torch.cat(seen, 1))


class Noting(nn.Module):
    def forward(self, x):
        self.n = len(x)
        return x


class Sized(nn.Module):
    """Asks its stem how many images there were."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc, self.head = Noting(), nn.Linear(12, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.fc(self.stem(x).flatten(1)).view(self.stem.n, -1))


@pytest.mark.parametrize(("network", "why"), [(Unboxing, "Box"), (Collecting, "ValueError"), (Sized, "RuntimeError")])
def test_what_hands_on_more_than_it_returns_is_run_whole_with_the_reason(network, why):
    model, batches = network().eval(), random_batches((3, 2, 2))
    with evaluating(model):
        expected, replay = logits_of(model, batches), Replay(model, batches)
        with pytest.warns(UserWarning, match=f"replaying {network.__name__} does not reproduce its logits .*{why}"):
            replay.advance(model.head)
        assert same(replayed(replay), expected) and same(replayed(replay), expected)


def test_runs_whole_what_found_no_room():
    model, batches = counted_network().eval(), random_batches((6,), [2] * 5)
    with evaluating(model):
        replay = Replay(model, batches, memory=3 * 2 * 7 * 4)  # three batches of two rows of seven floats
        replay.advance(model[4])
        assert kept_bytes(replay) == replay.memory
        computed(model)
        replayed(replay)
        assert computed(model) == [2, 2, 2, 5]


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = Counting(6, 50), Counting(50, 3)

    def forward(self, x):
        return self.fc2(F.dropout(self.fc1(x), training=True))


def test_a_random_network_is_run_whole_with_a_warning():
    model, batches = Random().eval(), random_batches((6,))
    with evaluating(model):
        replay = Replay(model, batches)
        assert replay.exact
        with pytest.warns(UserWarning, match="Random does not reproduce"):
            replay.advance(model.fc2)
        assert replay.exact is False
        assert kept_bytes(replay) == 0
        computed(model)
        assert [len(logits) for logits, _ in replay] == [3, 3, 2]
        assert computed(model) == [3, 3]
        replay.advance(model.fc1)  # warned once
        assert replay.exact is False
    assert_unpatched(model)


class Aliasing(nn.Module):
    """Changes in place what a module returned, by way of another name for it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.name, self.fc2 = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.fc1(x)
        other = self.name(x)
        other += 1
        return self.fc2(x)


class Hidden(nn.Module):
    """Changes in place what a module returned, behind the back of autograd, which counts such changes."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.fc1(x)
        x.data += 1
        return self.fc2(x)


@pytest.mark.parametrize("network", [Aliasing, Hidden])
def test_what_cannot_be_replayed_is_found_out(network):
    model, batches = network().eval(), random_batches((6,))
    with evaluating(model):
        replay = Replay(model, batches)
        with pytest.warns(UserWarning, match="not reproduce"):
            replay.advance(model.fc2)
        assert same(replayed(replay), logits_of(model, batches))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        self.skip = x
        return self.fc(x).relu()


class Stashing(nn.Module):
    """Reads what a submodule left in an attribute: a replay skips the submodule, and the attribute goes stale."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = Stem(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.stem(x) + self.stem.skip)


@pytest.mark.filterwarnings("ignore:.*not reproduced")
def test_a_network_that_hands_values_over_by_attribute_is_not_replayed_wrongly():
    model, batches = Stashing().eval(), random_batches((6,))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.head)
        assert same(replayed(replay), logits_of(copy.deepcopy(model), batches))


def test_a_layer_whose_weight_another_module_reads_is_replayed_from_there():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(5, 5)

        def forward(self, x):
            return F.linear(x, self.qkv.weight, self.qkv.bias)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), Reader(), nn.Linear(5, 3)).eval()
    batches = random_batches((3, 2, 2))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model[2].qkv)
        assert kept_bytes(replay) == 8 * 5 * 4
        perturb(model[2].qkv)
        assert same(replayed(replay), logits_of(model, batches))


def test_a_layer_that_never_runs_is_replayed_whole():
    model, batches = Backwards().eval(), random_batches((3, 2, 2))
    model.idle = nn.Linear(2, 2)
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.idle)
        assert kept_bytes(replay) == 0
        assert same(replayed(replay), logits_of(model, batches))


@pytest.mark.parametrize("name", ["cnn", "residual", "vgg11"])
def test_layers_may_come_in_any_order(name):
    build, shape, _ = NETWORKS[name]
    model, batches = build().eval(), random_batches(shape)
    with evaluating(model):
        replay = Replay(model, batches)
        for layer in reversed(forward_order(model, shape)):
            replay.advance(layer)
            perturb(layer)
            assert same(replayed(replay), logits_of(model, batches))


def test_an_error_in_the_network_leaves_it_unpatched():
    class Choosy(nn.Module):
        def forward(self, x):
            if self.broken:
                raise RuntimeError("broken")
            return x

    model, batches = nn.Sequential(nn.Linear(6, 6), Choosy(), nn.Linear(6, 3)).eval(), random_batches((6,))
    with evaluating(model):
        model[1].broken = False
        replay = Replay(model, batches)
        replay.advance(model[1])
        model[1].broken = True
        with pytest.raises(RuntimeError, match="broken"):
            replayed(replay)
        with pytest.raises(RuntimeError, match="broken"):
            replay.advance(model[2])
    assert_unpatched(model)


def test_an_iteration_that_is_given_up_leaves_the_network_unpatched():
    model, batches = Backwards().eval(), random_batches((3, 2, 2))
    with evaluating(model):
        replay = Replay(model, batches)
        replay.advance(model.last)
        next(iter(replay))
        assert_unpatched(model)


def test_a_forward_that_was_patched_before_comes_back():
    model, batches = Backwards().eval(), random_batches((3, 2, 2))
    original = model.first.forward
    patched = model.first.forward = lambda x: 2 * original(x)
    with evaluating(model):
        expected = logits_of(model, batches)
        replay = Replay(model, batches)
        replay.advance(model.last)
        assert same(replayed(replay), expected)
    assert model.first.__dict__["forward"] is patched


def test_the_order_of_the_forward_pass_is_that_of_the_gram_matrices():
    model = Backwards()
    layers = matrix_layers(model)
    order = forward_order(model, (3, 2, 2))
    assert order == [layers[name] for name in accumulate_grams(model, [torch.randn(4, 12)], progress=False)]
