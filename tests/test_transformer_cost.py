import pytest
import torch

from urank import models
from urank.factorize import count_cost
from urank.reproduction import paper
from urank.reproduction.vit_macs import (
    HIDDEN,
    Transformer,
    flops_column,
    implied_ratio,
    macs,
    other_parameters,
    seen,
    weights,
)

NAMES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [224, 384])
def test_closed_form_is_what_torch_counts(name, side):
    with torch.device("meta"):
        network = models.create(f"torchvision/{name}", 1000, image_size=side)
        cost = count_cost(network, (3, side, side))
    sizes = Transformer.of(network)
    assert sum(macs(sizes).values()) == cost.macs
    assert sum(weights(sizes).values()) + other_parameters(sizes) == cost.params


def test_a_whole_network_costs_all_of_it():
    sizes = Transformer(224, 16, 768, 12)
    assert implied_ratio(sizes, 1.0) == pytest.approx(1)
    assert implied_ratio(sizes, 1.0, HIDDEN) == pytest.approx(seen(sizes)) == pytest.approx(0.72, abs=0.01)


def test_attention_stays_when_the_weights_go():
    sizes = Transformer(224, 16, 768, 12)
    nothing = other_parameters(sizes) / (sum(weights(sizes).values()) + other_parameters(sizes))
    parts = macs(sizes)
    assert implied_ratio(sizes, nothing) == pytest.approx(parts["attention"] / sum(parts.values()))
    assert implied_ratio(sizes, nothing, HIDDEN) == pytest.approx(0, abs=1e-9)


def test_flops_column_is_that_of_the_separate_calculation():
    """data/paper/flops_vs_params_check.csv was worked out without this module."""
    column, check = flops_column(), paper.table("flops_vs_params_check")
    names = check["row"].replace({"ViTB16 SWAG Lin": "ViTB16, FT, Lin", "ViTB16 SWAG E2E at 384": "ViTB16, FT, E2E"})
    check = check.set_index(names.str.replace(" eps ", " at tolerance "))
    column = column.set_index("network").loc[check.index]
    assert (column["printed"] == check["flops_ratio_printed"]).all()
    assert (column["params"] == check["params_ratio_printed"]).all()
    assert (column["implied"] - check["flops_ratio_implied_by_params"]).abs().max() < 0.011
    hidden = check["implied_if_factorised_model_profiled_without_qkv_and_attention"]
    assert (column["hidden"] - hidden).abs().max() < 0.006
    assert (column["hidden"].isna() == hidden.isna()).all()
