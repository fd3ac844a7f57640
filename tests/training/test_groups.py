"""Groups of tokens, and the numbers of a line from the sums of a step."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from bimedix_jax.data.loader import Group
from bimedix_jax.data.pack import Row, Segment, groups_of
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.training.groups import MOST_KINDS, Groups, router_metrics
from bimedix_jax.training.metrics import numbers

LAYERS, EXPERTS = 2, 4


def counted(*rows: tuple[str, str, int]) -> list[Group]:
    return [Group(language=a, kind=b, source="s", examples=1, tokens=2 * n, learned_tokens=n) for a, b, n in rows]


def test_groups_are_those_of_the_data():
    data = counted(("en", "qa", 5), ("ar", "chat", 7), ("ar", "qa", 1), ("en", "qa", 3), ("", "", 9))
    groups = Groups.of_data(data)
    assert groups.pairs == (("ar", "chat"), ("ar", "qa"), ("en", "qa"))
    assert groups.languages == ["ar", "en"]
    assert groups.of("ar") == [0, 1]
    assert Groups.of_data(data, ["en"]).pairs == (("en", "qa"),)
    assert Groups.of_data(data, ["en", "ar"]).languages == ["en", "ar"], "in the order asked for"
    assert Groups.of_data([]).pairs == ()


def test_rare_kinds_share_a_group():
    data = counted(*[("en", f"kind{n}", 10 + n) for n in range(MOST_KINDS + 3)])
    groups = Groups.of_data(data)
    assert [kind for _, kind in groups.pairs] == [*(f"kind{n}" for n in range(3, MOST_KINDS + 3)), ""]
    segments = tuple(
        Segment(i + 1, str(i), *own, "s", 1, 1)
        for i, own in enumerate([("en", "kind5"), ("en", "kind0"), ("ar", "qa")])
    )
    row = Row(np.zeros(4, np.int32), np.array([1, 2, 3, 0], np.int32), np.ones(4, bool), segments)
    assert groups_of(row, groups.pairs).tolist() == [2, MOST_KINDS, MOST_KINDS + 1, MOST_KINDS + 1]


def sums(tokens: list[int]) -> RouterSums:
    """Sums of groups with these numbers of tokens, of which each chooses expert 0 and expert 1 + its group."""
    chosen = np.zeros((LAYERS, len(tokens), EXPERTS), np.float32)
    for group, count in enumerate(tokens):
        chosen[:, group, [0, min(1 + group, EXPERTS - 1)]] = count
    each = np.broadcast_to(np.asarray(tokens, np.float32), (LAYERS, len(tokens)))
    names = [field.name for field in dataclasses.fields(RouterSums)]
    values: dict[str, Any] = {name: each * (2.0 if name == "z_LX" else 1.0) for name in names}
    values |= {"chosen_LXE": chosen, "mass_LXE": chosen}
    return RouterSums(**values)


def test_languages_are_sums_of_their_groups():
    groups = Groups((("ar", "qa"), ("en", "qa"), ("en", "")))
    losses = np.array([[20.0, 10.0], [5.0, 5.0], [9.0, 3.0], [0.0, 0.0]], np.float32)
    line = router_metrics(sums([4, 2, 0, 0]), losses, groups)
    np.testing.assert_allclose(line["load"], [[0.5, 4 / 12, 2 / 12, 0.0]] * LAYERS)
    assert line["dead_experts"].tolist() == [1] * LAYERS
    assert line["load_max_over_mean"].tolist() == [2.0] * LAYERS
    np.testing.assert_allclose(line["router_z"], 2.0)
    english, arabic = line["by_language"]["en"], line["by_language"]["ar"]
    assert english["nll"] == pytest.approx(14 / 8)
    assert (english["supervised_tokens"], english["tokens"]) == (8, 2)
    assert arabic["load"].tolist() == [[0.5, 0.5, 0, 0]] * LAYERS
    assert set(arabic) == {
        *("nll", "supervised_tokens", "tokens", "load", "load_entropy", "load_max_share", "load_max_over_mean"),
        *("dead_experts", "entropy", "margin", "top_margin", "z"),
    }
    assert line["by_group"]["en/other"]["nll"] == 3.0
    assert line["by_group"]["en/other"]["load"].tolist() == [[0.0] * EXPERTS] * LAYERS, "no token, and no NaN"
    assert list(line["by_group"]) == ["ar/qa", "en/qa", "en/other"]


def test_the_numbers_of_a_list_name_their_float32():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    found = numbers(values)
    assert np.array_equal(np.asarray(found, np.float32), values)
    assert len(json.dumps(found)) < 0.7 * len(json.dumps(values.tolist()))
    assert numbers(np.float32(0.1)) == float(np.float32(0.1)), "a scalar is not shortened"
    assert numbers(np.array([1, 2])) == [1, 2]
