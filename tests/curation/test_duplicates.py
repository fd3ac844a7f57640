"""Near-duplicates: each removed text is similar to a kept one, and exact copies are removed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix import duplicates
from bimedix_jax.curation.mix.duplicates import Duplicate

WORDS = [f"word{number}" for number in range(4000)]


def text(seed: int, length: int = 200) -> list[str]:
    return [WORDS[i] for i in np.random.default_rng(seed).integers(0, len(WORDS), length)]


def changed(words: list[str], share: float, seed: int = 9) -> list[str]:
    random = np.random.default_rng(seed)
    found = list(words)
    for place in random.choice(len(words), round(share * len(words)), replace=False):
        found[place] = f"other{random.integers(10**6)}"
    return found


def removed(texts: list[list[str]], threshold: float = 0.8, wanted: np.ndarray | None = None) -> list[Duplicate]:
    shingles = [fingerprints.shingles(fingerprints.words(" ".join(words))) for words in texts]
    bands = [fingerprints.bands(shingles[start : start + 7]) for start in range(0, len(texts), 7)]
    taken = np.ones(len(texts), bool) if wanted is None else wanted
    return list(duplicates.find(bands, taken, shingles.__getitem__, threshold))


def test_similarity_is_the_share_of_common_runs_of_five_words() -> None:
    ten = [f"w{i}" for i in range(10)]
    one = fingerprints.shingles(fingerprints.words(" ".join(ten)))
    other = fingerprints.shingles(fingerprints.words(" ".join([*ten[:8], "x", "y"])))
    assert (len(one), len(other)) == (6, 6)
    assert fingerprints.similarity(one, other) == 4 / 8
    assert fingerprints.similarity(one, one) == 1
    nothing = fingerprints.shingles(fingerprints.words("?!"))
    assert len(nothing) == 0 == fingerprints.similarity(nothing, nothing)
    two = fingerprints.shingles(fingerprints.words("Two words."))
    assert fingerprints.similarity(two, fingerprints.shingles(fingerprints.words("two  WORDS"))) == 1


def test_copies_in_another_spelling_are_found_in_both_languages() -> None:
    english = " ".join(text(1, 60))
    arabic = "يعاني المريض من ألم في الصدر منذ يومين مع ضيق في التنفس وتعرق شديد ويتناول دواء الضغط بانتظام"
    copies = [english, arabic, english.upper().replace(" ", ", "), arabic.replace("أ", "ا") + "."]
    found = removed([copy.split() for copy in copies])
    assert [(pair.row, pair.of) for pair in found] == [(2, 0), (3, 1)]


def test_nearly_all_duplicates_above_the_threshold_are_found_and_none_below() -> None:
    """One word in fifty changed leaves 0.82 of the runs, one in twelve 0.45."""
    originals = [text(i) for i in range(200)]
    near = [changed(words, 0.02, i) for i, words in enumerate(originals)]
    far = [changed(words, 1 / 12, i) for i, words in enumerate(originals)]
    found = removed(originals + near + far)
    like = {pair.row: pair for pair in found}
    assert all(pair.similarity >= 0.8 for pair in found)
    shingles = [[fingerprints.shingles(fingerprints.words(" ".join(w))) for w in ws] for ws in (originals, near)]
    meant = [i for i, (a, b) in enumerate(zip(*shingles, strict=True)) if fingerprints.similarity(a, b) >= 0.8]
    assert len(meant) > 150
    assert sum(like.get(200 + i) is not None and like[200 + i].of == i for i in meant) >= 0.99 * len(meant)
    assert not any(row >= 400 for row in like)


@settings(deadline=None, max_examples=15)
@given(picks=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 0.01, 0.02, 0.04])), min_size=1, max_size=40))
def test_each_removed_text_is_similar_to_a_kept_one(picks: list[tuple[int, float]]) -> None:
    texts = [changed(text(which, 120), share, number) for number, (which, share) in enumerate(picks)]
    found = removed(texts)
    gone = {pair.row for pair in found}
    assert len(gone) == len(found)
    assert all(pair.of < pair.row and pair.of not in gone for pair in found)
    first = {which: number for number, (which, share) in reversed(list(enumerate(picks))) if share == 0}
    exact = [number for number, (which, share) in enumerate(picks) if share == 0 and number != first[which]]
    assert gone.issuperset(exact), "every exact copy of an earlier text is removed"
    assert 0 not in gone


def test_a_frequent_text_is_kept_once_and_has_few_candidate_pairs() -> None:
    texts = [text(5, 40)] * 3000
    assert {pair.of for pair in removed(texts)} == {0}
    pairs = duplicates._candidates(np.zeros(3000, np.uint64), np.arange(3000, dtype=np.uint64))
    assert len(pairs) < 3000 * (duplicates.NEAREST + 1)


def test_only_wanted_texts_take_part_and_the_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text(i % 5, 50) for i in range(20)]
    wanted = np.arange(20) >= 3
    whole = removed(texts, wanted=wanted)
    assert {pair.of for pair in whole} == {3, 4, 5, 6, 7}
    assert all(pair.row > 7 for pair in whole)
    monkeypatch.setattr(duplicates, "BLOCK", 4)
    assert removed(texts, wanted=wanted) == whole
    assert removed([], wanted=np.zeros(0, bool)) == []


def test_hashes_are_stable() -> None:
    """They decide which records a set holds, so they must not depend on process, machine or version."""
    hashes = fingerprints.words("Take 2 tablets, twice daily. خذ قرصين")
    assert [hex(h) for h in hashes[:2].tolist()] == ["0x461356f17eb5f856", "0x6c6f6ffdf61ef41b"]
    assert hex(fingerprints.whole(hashes)) == "0x57e406d195e4c77"
    assert fingerprints.runs(hashes, 2)[0] == (int(hashes[0]) * 0x9E3779B97F4A7C15 + int(hashes[1])) % 2**64
    assert hex(int(fingerprints.scatter(hashes[:1], "order 0")[0])) == "0xffcabbbca82eb076"
    assert fingerprints.bands([fingerprints.shingles(hashes)]).shape == (1, fingerprints.BANDS)
