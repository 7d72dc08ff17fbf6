import json
import sys
from dataclasses import replace

import pandas as pd
import pytest

from urank.plan import LayerRank, Probe, RankPlan

FIRST = LayerRank("features.0", d=27, m=8, weight_rank=8, k_s=20, k_t=6, rank=6, correct=95)
LAST = LayerRank("classifier", d=64, m=10, weight_rank=9, k_s=3, k_t=10, rank=3, correct=94)
PROBES = (Probe("features.0", "S", 14, False, None), Probe("features.0", "S", 20, True, 95))
PLAN = RankPlan((FIRST, LAST), tolerance=0.29, mode="joint", total=100, correct=96, probes=PROBES)
# A rule that consulted no accuracy.
RULE = RankPlan((replace(FIRST, correct=None), replace(LAST, correct=None)), None, "output_pca", 0, None)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, probes=(), tolerance=None, mode="energy", total=0, correct=0),
        replace(PLAN, layers=(replace(FIRST, layer='Größe "1"\n'),)),
        RULE,
        replace(PLAN, tolerance=0, counts="agreement"),
    ],
)
def test_comes_back_from_json_equal(plan, tmp_path):
    path = tmp_path / "new" / "plan.json"
    plan.save(path)
    assert RankPlan.load(path) == plan
    assert RankPlan.load(str(path)) == plan
    assert hash(RankPlan.load(path)) == hash(plan)
    assert RankPlan.from_dict(plan.to_dict()) == plan


def test_frame_has_the_columns_of_the_paper_in_order():
    frame = PLAN.to_frame()
    assert list(frame.columns) == ["layer", "d", "m", "weight_rank", "k_s", "k_t", "rank", "utilization", "correct"]
    assert frame.iloc[0].tolist() == ["features.0", 27, 8, 8, 20, 6, 6, 0.75, 95]
    assert frame["layer"].tolist() == ["features.0", "classifier"]
    assert list(RankPlan((), None, "none", 0, 0).to_frame().columns) == list(frame.columns)


def test_frame_keeps_what_is_missing():
    assert RULE.to_frame()["correct"].isna().all()
    for plan in (PLAN, RULE, RankPlan((), None, "none", 0, None)):
        assert plan.to_frame()["correct"].dtype == "Int64"


def test_means_over_no_layer_are_refused():
    empty = RankPlan((), None, "none", 0, None)
    for name in ("mlu", "weight_mlu"):
        with pytest.raises(ValueError, match="no layer"):
            getattr(empty, name)


def test_a_plan_from_before_counts_counts_labels(tmp_path):
    content = PLAN.to_dict()
    assert content.pop("counts") == "labels"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    assert RankPlan.load(path) == PLAN


def test_utilization_and_its_means():
    assert (FIRST.utilization, LAST.utilization) == (6 / 8, 3 / 10)
    assert PLAN.mlu == pytest.approx((0.75 + 0.3) / 2)
    assert PLAN.weight_mlu == pytest.approx((1 + 0.9) / 2)


@pytest.mark.parametrize(("rank", "useful"), [(0, True), (3, True), (4, False), (6, False)])
def test_two_factors_are_useful_where_they_hold_fewer_weights(rank, useful):
    """12 x 6: the break-even rank 12 * 6 / 18 = 4 saves nothing."""
    assert replace(FIRST, d=12, m=6, rank=rank).useful is useful
    assert not replace(FIRST, d=5, m=1, rank=0).useful  # split, it has rank 1


def test_a_layer_by_its_name():
    assert PLAN["classifier"] == LAST
    with pytest.raises(KeyError, match="no such"):
        PLAN["no such"]


def test_layers_in_another_order():
    assert PLAN.in_order(["classifier", FIRST.layer]) == replace(PLAN, layers=(LAST, FIRST))


def test_probes_frame_keeps_what_is_missing():
    frame = PLAN.probes_frame()
    assert list(frame.columns) == ["layer", "side", "k", "passed", "correct"]
    assert frame["correct"].dtype == "Int64"
    assert frame["correct"][0] is pd.NA
    assert frame["correct"][1] == 95
    assert frame["passed"].tolist() == [False, True]


def test_probes_frame_of_no_probe():
    frame = replace(PLAN, probes=()).probes_frame()
    assert list(frame.columns) == ["layer", "side", "k", "passed", "correct"]
    assert len(frame) == 0


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"plan\.json"):
            RankPlan.load(path)


def changed(**entries):
    return PLAN.to_dict() | entries


def with_first(part, **entries):
    """PLAN with other values in its first layer or probe."""
    first, *rest = PLAN.to_dict()[part]
    return changed(**{part: [first | entries, *rest]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_first("layers", rank="6"), "LayerRank: rank must be int, got '6'"),
        (with_first("layers", d=27.0), "d must be int, got 27.0"),
        (with_first("layers", k_s=True), "k_s must be int, got True"),
        (with_first("layers", layer=0), "layer must be str, got 0"),
        (with_first("layers", m=None), "m must be int, got None"),
        (with_first("layers", correct=[95]), r"correct must be int \| None, got \[95\]"),
        (with_first("probes", passed=1), "Probe: passed must be bool, got 1"),
        (with_first("probes", correct="95"), "correct must be int"),
        (changed(tolerance="0.1"), r"RankPlan: tolerance must be float \| None, got '0.1'"),
        (changed(tolerance=False), "tolerance must be float"),
        (changed(mode=None), "mode must be str, got None"),
        (changed(total={}), "total must be int"),
        (changed(counts="votes"), "'labels' or 'agreement', got 'votes'"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(content, message, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"other\.json: not a rank plan \(.*{message}"):
        RankPlan.load(path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        "plan",
        3,
        [1, 2],
        {"layers": [], "probes": []},
        changed(layers=3),
        changed(layers=[{"layer": "features.0"}]),
        changed(layers=[1]),
        changed(layers=[PLAN.to_dict()["layers"][0] | {"surplus": 1}]),
        changed(probes=None),
        changed(surplus=1),
    ],
)
def test_json_that_is_no_plan_is_named(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"other\.json"):
        RankPlan.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        RankPlan.load(tmp_path / "plan.json")


def test_holds_no_tensor():
    assert not any(name == "torch" or name.startswith("torch.") for name in vars(sys.modules["urank.plan"]))
    json.dumps(PLAN.to_dict(), allow_nan=False)
