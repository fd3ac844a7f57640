"""chrF, ROUGE-L and shares of scripts, in English and Arabic, against plain computations."""

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.text_metrics import arabic_share, chrf, is_in, longest_common, mean_interval, rouge_l, words


def test_words_of_any_script():
    assert words("Take 500-mg, twice!") == ["take", "500", "mg", "twice"]
    assert words("خُذْ قُرْصَيْنِ ٥٠٠ ملغ، مرتين.") == ["خذ", "قرصين", "500", "ملغ", "مرتين"]
    assert words("الدـــواء") == ["الدواء"]
    assert words("\ufe8d\ufedf\ufedc\ufe92\ufeaa") == ["الكبد"]  # presentation forms
    assert words("Naïve café") == words("NAÏVE CAFÉ")
    assert words("… — !") == []


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("الكبد عضو كبير", "الكبد عضو كبير", 1.0),
        ("الكَبِدُ عضوٌ كبير", "الكبد عضو كبير.", 1.0),
        ("عضو الكبد كبير", "الكبد عضو كبير", 2 / 3),  # two words in the same order
        ("الكبد كبير", "الكبد عضو كبير جدا", 2 * 2 / 6),
        ("the liver is large", "The liver is a large organ.", 2 * 4 / 10),
        ("القلب", "الكبد", 0.0),
        ("", "الكبد", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_common_words_in_order(answer, reference, f1):
    assert rouge_l(answer, reference) == pytest.approx(f1)


SHORT = st.lists(st.sampled_from("ابج"), max_size=7)


@settings(max_examples=60, deadline=None)
@given(SHORT, SHORT)
def test_the_common_subsequence_is_the_longest(first, second):
    def subsequences(items):
        return {part for size in range(len(items) + 1) for part in itertools.combinations(items, size)}

    assert longest_common(first, second) == max(map(len, subsequences(first) & subsequences(second)))


def chrf_by_hand(answer, reference, orders=6, beta=2):
    """chrF2 of one pair without whitespace (Popovic 2015): mean precision and recall over n-grams of 1 to 6."""
    scores = []
    for order in range(1, orders + 1):
        grams = []
        for text in (answer, reference):
            plain = "".join(text.split())
            counted = {}
            for start in range(len(plain) - order + 1):
                gram = plain[start : start + order]
                counted[gram] = counted.get(gram, 0) + 1
            grams.append(counted)
        ours, theirs = grams
        if not ours or not theirs:
            continue
        common = sum(min(count, theirs.get(gram, 0)) for gram, count in ours.items())
        scores.append((common / sum(ours.values()), common / sum(theirs.values())))
    precision = sum(p for p, _ in scores) / len(scores)
    recall = sum(r for _, r in scores) / len(scores)
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("يفرز البنكرياس الأنسولين", "البنكرياس هو العضو الذي يفرز الأنسولين"),
        ("الربو مرض مزمن", "الربو مرض مزمن"),
        ("The pancreas makes insulin.", "Insulin is made in the pancreas."),
    ],
)
def test_chrf_is_that_of_the_formula(answer, reference):
    assert chrf([answer], [reference]) == pytest.approx(chrf_by_hand(answer, reference), abs=1e-6)


def test_chrf_without_sacrebleu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(BimedixError, match=r"bimedix_jax\[data\]"):
        chrf(["a"], ["a"])


def test_the_script_decides_the_language():
    assert arabic_share("قرص Panadol") == pytest.approx(3 / 10)
    assert arabic_share("12 % + 3") is None
    assert is_in("تناول قرصا من Panadol بعد الطعام", "ar")
    assert is_in("Take Panadol (بنادول) after a meal", "en")
    assert not is_in("Take it", "ar")
    assert not is_in("", "en")


def test_the_interval_is_over_clusters():
    """Answers of one chat are alike: counted as single records they would make the interval too narrow."""
    values, chats = [0.0] * 50 + [1.0] * 50, [str(index // 10) for index in range(100)]
    found, single = mean_interval(values, chats), mean_interval(values, [str(index) for index in range(100)])
    assert found is not None
    assert single is not None
    assert found[1] - found[0] > 2 * (single[1] - single[0])
    assert found[0] < 0.5 < found[1]


def test_few_or_equal_values_have_no_interval():
    """One record, nine records, or twenty equal scores: a bootstrap would give an interval without width."""
    several = [str(index) for index in range(20)]
    assert mean_interval([3.0], ["a"]) is None
    assert mean_interval([3.0] * 20, several) is None
    assert mean_interval(list(map(float, range(20))), several[:9] + several[:9] + ["0", "1"]) is None
    assert mean_interval(list(map(float, range(10))), several[:10]) is not None
