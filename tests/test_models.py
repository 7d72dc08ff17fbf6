import os
import pickle

import pytest
import timm
import torch
import torchvision
from conftest import Trap
from torch import nn

from urank import datasets
from urank.layers import matrix_layers
from urank.models import NETWORKS, check_name, create
from urank.models.libraries import names_of
from urank.reproduction import paper
from urank.reproduction.paper_networks import PAPER
from urank.shared_layers import separate_uses

# Matrix layers, with the shortcuts of a ResNet and the patch embedding of a transformer.
LAYERS = {
    "vgg11": 8 + 1,
    "vgg13": 10 + 1,
    "vgg16": 13 + 1,
    "vgg19": 16 + 1,
    "resnet18": 20 + 2,
    "resnet29": 29 + 3,
    "resnet32": 32 + 2,
    "resnet50": 50 + 2,
    "resnet56": 56 + 2,
    "resnet101": 101 + 3,
    "vit": 6 * 4 + 2,
    "deit": 12 * 4 + 2,
    "vit_pe": 6 * 6 + 2,  # queries, keys, values, output and two of the feed-forward network: six uses
    "resnet29_pe1": 29 + 2,  # no projection at the entry of a tied stage
    "resnet29_pe2": 29 + 1,
    "swin": 10 * 4 + 2 + 2,  # the second and the third stage start with a reduction
}
IMAGENET = sorted((model for model, dataset in PAPER if dataset == "ImageNet-1k"), key=str.lower)
IMAGE_SIZES = {"ViTB16, FT, E2E": 384}
TIMM_MILLIONS = {
    "DeiT-Tiny": "5.72",
    "DeiT-Small": "22.05",
    "DeiT-Base": "86.57",
    "SWIN-Tiny": "28.29",
    "SWIN-Small": "49.61",
    "SWIN-Base": "87.77",
    "SWIN-Large": "196.53",
}


def shapes_of(name, classes=10, **options):
    """The network on the meta device."""
    with torch.device("meta"):
        return create(name, classes, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("classes", "width"), [(10, 0.34), (3, 0.01), (1, 0.001)])
def test_every_network_returns_one_logit_per_class(name, classes, width):
    model = create(name, classes=classes, width=width)
    assert len(matrix_layers(separate_uses(model, torch.randn(1, 3, 32, 32)))) == LAYERS[name]
    for training in (False, True):
        logits = model.train(training)(torch.randn(2, 3, 32, 32))
        assert isinstance(logits, torch.Tensor) and logits.shape == (2, classes) and logits.isfinite().all()


def basic(inputs, channels):
    """Parameters of two 3 x 3 convolutions with batch norms, and of the shortcut if the channels change."""
    shortcut = 0 if inputs == channels else (inputs + 2) * channels
    return 9 * inputs * channels + 9 * channels**2 + 4 * channels + shortcut


def bottleneck(inputs, channels):
    """Parameters of convolutions 1 x 1, 3 x 3, 1 x 1 (to 4 * channels) with batch norms, and of the shortcut."""
    shortcut = 0 if inputs == 4 * channels else (inputs + 2) * 4 * channels
    return (inputs + 9 * channels + 4 * channels) * channels + (2 + 2 + 8) * channels + shortcut


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    ("name", "block", "expansion", "n", "millions"),
    [
        ("resnet18", basic, 1, 3, 0.272),
        ("resnet29", bottleneck, 4, 3, 0.313),
        ("resnet50", basic, 1, 8, 0.759),
        ("resnet101", bottleneck, 4, 11, 1.055),
    ],
)
def test_resnet_has_the_parameters_of_the_closed_form(name, block, expansion, n, millions, classes):
    ends = 27 * 16 + 32 + (64 * expansion + 1) * classes
    starts = sum(block(i, c) for i, c in [(16, 16), (16 * expansion, 32), (32 * expansion, 64)])
    rest = (n - 1) * sum(block(c * expansion, c) for c in (16, 32, 64))
    model = shapes_of(name, classes)
    assert count(model) == ends + starts + rest
    if classes == 10:
        assert round(count(model) / 1e6, 3) == millions


def test_resnet_halves_the_image_where_it_doubles_the_channels():
    model, sizes = create("resnet18", width=0.25), []
    for part in (model.stem, model.stage1, model.stage2, model.stage3):
        part.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize(("name", "depth", "features"), [("vit", 6, 192), ("deit", 12, 192)])
@pytest.mark.parametrize("width", [1, 1 / 3])
def test_vit_has_the_parameters_of_the_closed_form(name, depth, features, width):
    d = round(features * width)
    block = 4 * d**2 + 8 * d**2 + 9 * d + 4 * d  # attention, MLP, their biases, two layer norms
    embedding, positions, norm, head = (48 + 1) * d, (1 + 65) * d, 2 * d, (d + 1) * 10  # with a class token
    assert count(shapes_of(name, 10, width=width)) == depth * block + embedding + positions + norm + head


def test_swin_doubles_its_features_and_has_4_x_4_windows():
    model = shapes_of("swin")
    assert [stage.blocks[-1].dim for stage in model.layers] == [96, 192, 384]
    assert [stage.blocks[0].attn.window_size for stage in model.layers] == [(4, 4)] * 3
    assert [stage.blocks[0].input_resolution for stage in model.layers] == [(16, 16), (8, 8), (4, 4)]


class TestPaper:
    def test_every_row_of_tables_1_3_and_4_has_a_network(self):
        printed = [(row["model"], "ImageNet-1k") for _, row in paper.table("table1_imagenet").iterrows()]
        printed += [(row["model"], row["dataset"]) for _, row in paper.table("table3_cifar").iterrows()]
        printed += [(row["model"], "ImageNet-1k") for _, row in paper.table("table4_pretraining").iterrows()]
        assert len(printed) == 33 and set(printed) == set(PAPER)

    def test_weights_match_the_accuracy_of_the_paper(self):
        aliases = {"ViTB16 FT Lin": "ViTB16, FT, Lin", "ViTB16 FT E2E": "ViTB16, FT, E2E"}
        for _, row in paper.table("weights_match").iterrows():
            name, weights = PAPER[aliases.get(row["paper_model"], row["paper_model"]), "ImageNet-1k"]
            library, network = name.split("/")
            prefix = network if library == "timm" else torchvision.models.get_model_weights(network).__name__
            assert (row["library"], row["weights"]) == (library, f"{prefix}.{weights}")

    @pytest.mark.parametrize("model", IMAGENET)
    def test_imagenet_networks_have_the_documented_size(self, model):
        name, weights = PAPER[model, "ImageNet-1k"]
        library, network = name.split("/")
        options = dict(image_size=IMAGE_SIZES[model]) if model in IMAGE_SIZES else {}
        found = count(shapes_of(name, 1000, **options))
        if library == "torchvision":
            assert found == torchvision.models.get_model_weights(network)[weights].meta["num_params"]
        else:
            assert f"{found / 1e6:.2f}" == TIMM_MILLIONS[model]

    @pytest.mark.parametrize(("model", "dataset"), [key for key in PAPER if key[1] != "ImageNet-1k"])
    def test_cifar_networks_have_the_inferred_size(self, model, dataset):
        name, weights = PAPER[model, dataset]
        row = paper.table("table3_cifar").set_index(["model", "dataset"]).loc[(model, dataset)]
        found = count(shapes_of(name, datasets.CLASSES[dataset.lower()]))
        assert weights is None and found / 1e6 == pytest.approx(row["params_orig_M_inferred"], abs=0.001)

    @pytest.mark.parametrize(
        ("model", "layers"),
        [
            ("DeiT-Tiny", 12 * 4 + 2),
            ("DeiT-Base", 12 * 4 + 2),
            ("SWIN-Tiny", 12 * 4 + 3 + 2),
            ("SWIN-Large", 24 * 4 + 3 + 2),
            ("ResNet34", 34 + 3),
            ("ResNet50", 50 + 4),
            ("ResNet101", 101 + 4),
            ("WideResNet101_2", 101 + 4),
        ],
    )
    def test_imagenet_networks_have_the_expected_number_of_layers(self, model, layers):
        assert len(matrix_layers(shapes_of(PAPER[model, "ImageNet-1k"].name, 1000))) == layers


class TestLibraries:
    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18", "timm/resnet18.a1_in1k"])
    def test_classes_and_options_reach_the_library(self, name):
        options = dict(norm_layer=nn.Identity)
        model = shapes_of(name, 7, **options)
        assert model.fc.out_features == 7 and isinstance(model.bn1, nn.Identity)

    @pytest.mark.parametrize("name", [*NETWORKS, *sorted({network.name for network in PAPER.values()})])
    def test_known_names_are_accepted(self, name):
        check_name(name)

    def test_names_contain_only_classifiers(self):
        assert "resnet50" in names_of("torchvision") and "deeplabv3_resnet50" not in names_of("torchvision")
        assert {"deit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k"} <= set(names_of("timm"))

    @pytest.mark.parametrize(
        "name", ["timm/", "torchvision/", "timm/#", "timm/hf-hub:timm/resnet18.a1_in1k", "timm/local-dir:."]
    )
    def test_an_unknown_name_is_refused(self, name):
        with pytest.raises(ValueError, match="unknown network"):
            create(name)

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("timm/vit_tinyy_patch16_224", "timm/vit_tiny_patch16_224"),
            ("timm/deit_tiny_patch16_224.fb_in2k", "timm/deit_tiny_patch16_224.fb_in1k"),
            ("torchvision/vit_b_17", "torchvision/vit_b_16"),
            ("torchvision/ResNet18", "torchvision/resnet18"),
        ],
    )
    def test_a_misspelled_name_is_refused_with_suggestions(self, name, near):
        with pytest.raises(ValueError, match=f"unknown network '{name}': did you mean .*{near}"):
            check_name(name)
        with pytest.raises(ValueError, match=near):
            create(name)

    def test_a_width_is_refused(self):
        with pytest.raises(ValueError, match="timm/resnet18: the width of a library's network is fixed.*width=0.5"):
            create("timm/resnet18", width=0.5)

    @pytest.mark.parametrize("arguments", [dict(pretrained=True), dict(pretrained="V1"), dict(depth=3)])
    def test_own_networks_accept_only_classes_and_width(self, arguments):
        with pytest.raises(ValueError, match="vgg11: only classes and width can be set"):
            create("vgg11", **arguments)

    def test_unknown_weights_are_refused_with_a_list_of_known_ones(self):
        with pytest.raises(ValueError, match="torchvision/resnet50 has no.*weights 'IMAGENET1K_V3'.*IMAGENET1K_V2"):
            create("torchvision/resnet50", 1000, pretrained="IMAGENET1K_V3")
        with pytest.raises(ValueError, match="timm/resnet50.a9_in1k'.*timm/resnet50.a1_in1k"):
            create("timm/resnet50", 1000, pretrained="a9_in1k")
        with pytest.raises(ValueError, match="timm has no published weights for"):
            create(f"timm/{unpublished()}", 1000, pretrained=True)

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
    def test_published_weights_have_a_fixed_number_of_classes(self, name):
        with pytest.raises(ValueError, match=f"{name}: the published weights have 1000 classes, not 10"):
            create(name, 10, pretrained=True)


def unpublished():
    return next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)


class TestPublishedWeights:
    """The weights are in files that the libraries read before they download: torchvision's cache, timm's `file`."""

    @pytest.mark.parametrize("pretrained", [True, "DEFAULT", "IMAGENET1K_V1"])
    def test_of_torchvision_are_loaded(self, cached, pretrained):
        weights = create("torchvision/squeezenet1_1", 1000).state_dict()
        torch.save(weights, cached)
        loaded = create("torchvision/squeezenet1_1", 1000, pretrained=pretrained).state_dict()
        assert all(torch.equal(weights[key], loaded[key]) for key in weights) and len(weights) == len(loaded)

    def test_of_torchvision_are_not_unpickled(self, cached, tmp_path):
        torch.save(Trap(tmp_path / "opened"), cached)
        with pytest.raises(pickle.UnpicklingError):
            create("torchvision/squeezenet1_1", 1000, pretrained=True)
        assert not (tmp_path / "opened").exists()

    @pytest.mark.parametrize("pretrained", [True, "r160_in1k"])
    def test_of_timm_are_loaded(self, tmp_path, pretrained):
        weights = create("timm/test_resnet", 1000).state_dict()
        torch.save(weights, tmp_path / "weights.pth")
        overlay = dict(file=str(tmp_path / "weights.pth"))
        model = create("timm/test_resnet", 1000, pretrained=pretrained, pretrained_cfg_overlay=overlay)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())

    def test_of_timm_are_not_unpickled(self, tmp_path):
        torch.save(Trap(tmp_path / "opened"), tmp_path / "weights.pth")
        overlay = dict(file=str(tmp_path / "weights.pth"))
        with pytest.raises(RuntimeError, match="weights_only=True blocked"):
            create("timm/test_resnet", 1000, pretrained=True, pretrained_cfg_overlay=overlay)
        assert not (tmp_path / "opened").exists()

    def test_are_not_needed_to_build_their_network(self, cached, monkeypatch):
        """The cache is empty, and nothing can be downloaded."""
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        create("torchvision/squeezenet1_1", 1000, pretrained="IMAGENET1K_V1", fetch=False)
        create("timm/test_resnet", 1000, pretrained="r160_in1k", fetch=False)
        with torch.device("meta"):
            large = create("torchvision/vit_b_16", 1000, pretrained="IMAGENET1K_SWAG_E2E_V1", fetch=False)
        assert large.image_size == 384

    @pytest.mark.parametrize("name", ["googlenet", "inception_v3", "vit_b_32", "resnet18"])
    def test_fit_their_network(self, name):
        """Its parameters have the names and shapes of the network that torchvision builds for these weights."""
        weights = torchvision.models.get_model_weights(name).DEFAULT
        with torch.device("meta"):
            built = create(f"torchvision/{name}", 1000, pretrained=True, fetch=False)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(weights), "get_state_dict", lambda *_, **__: {})
                patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
                theirs = torchvision.models.get_model(name, weights=weights)
        shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (built, theirs)]
        assert shapes[0] == shapes[1]
        assert getattr(built, "transform_input", None) == getattr(theirs, "transform_input", None)

    def test_of_torchvision_need_a_connection(self, cached, monkeypatch):
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match="torchvision/squeezenet1_1: the published weights could not be"):
            create("torchvision/squeezenet1_1", 1000, pretrained=True)
        assert list(cached.parent.iterdir()) == []

    def test_of_timm_need_a_connection(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="timm/test_resnet: the published weights could not be"):
            create("timm/test_resnet", 1000, pretrained=True, cache_dir=tmp_path)

    def test_of_a_damaged_download_are_refused(self, monkeypatch):
        def download(*_, **__):
            raise RuntimeError('invalid hash value (expected "b8a52dc0", got "00000000")')

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
        with pytest.raises(ConnectionError, match="squeezenet1_1: .* could not be downloaded .invalid hash"):
            create("torchvision/squeezenet1_1", 1000, pretrained=True)

    def test_leave_the_environment_variable_of_torch_load(self, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
        shapes_of("torchvision/resnet18")
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        shapes_of("timm/resnet18")
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_width_scales_every_channel_count():
    def widths(model):
        return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]

    assert widths(create("vgg11")) == [64, 128, 256, 256, 512, 512, 512, 512]
    assert widths(create("vgg11", width=0.25)) == [16, 32, 64, 64, 128, 128, 128, 128]


def test_weights_depend_on_the_seed_of_the_caller():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(create("vgg13", width=0.0625).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_convolutions_start_as_he_et_al_with_zero_biases():
    layer = create("vgg11", width=0.5).features[8]  # 64 to 128 channels: fan in and fan out differ
    assert layer.in_channels != layer.out_channels
    assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.02)
    assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["vgg12", "VGG11", "", "resnet", "hub/resnet18", 11, None])
def test_an_unknown_name_is_refused_with_a_list_of_known_ones(name):
    with pytest.raises(ValueError, match="unknown network.*vgg11, vgg13, vgg16, vgg19.*or timm/NAME"):
        create(name)


@pytest.mark.parametrize(
    "arguments",
    [dict(classes=0), dict(classes=-1), *(dict(width=width) for width in (0, -0.5, float("nan"), float("inf")))],
    ids=str,
)
def test_classes_and_width_must_be_positive(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        create("vgg11", **arguments)
