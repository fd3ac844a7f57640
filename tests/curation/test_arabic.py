"""The normaliser: equal spellings become one, a second pass changes nothing, and no word is lost."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bimedix_jax.curation.arabic import normalise, plain
from bimedix_jax.curation.assembly.disjoint import overlaps
from bimedix_jax.curation.fingerprints import shingles, similarity, words
from bimedix_jax.data.records import Language, Record, conversation

ARABIC = "أعطيت المريضة 4000 مجم من دواء الكلى في اليوم"
ENGLISH = "Is hypertension treated first in a 55-year-old patient with 4000 mg?"

# spellings of ARABIC and ENGLISH that readers see as the same text
SAME = {
    "Arabic-Indic digits": ARABIC.replace("4000", "٤٠٠٠"),
    "Persian digits": ARABIC.replace("4000", "۴۰۰۰"),
    "Farsi yeh and keheh": ARABIC.replace("ي", "ی").replace("ك", "ک"),
    "Urdu heh": ARABIC.replace("ه", "ہ").replace("ة", "ۃ"),
    "alef wasla": ARABIC.replace("ا", "ٱ"),
    "no hamza": ARABIC.replace("أ", "ا"),
    "alef maqsura for yeh": ARABIC.replace("ي", "ى"),
    "heh for teh marbuta": ARABIC.replace("ة", "ه"),
    "vowel signs": ARABIC.replace("م", "مُّ"),
    "tatweel": ARABIC.replace("ل", "لـــ"),
    "Quranic marks": ARABIC.replace("ر", "ر\u06d6"),
    "presentation forms": ARABIC.replace("لم", "\ufedf\ufee4").replace("ف", "\ufed1"),
    "zero-width non-joiner": ARABIC.replace("ي", "ي\u200c"),
    "direction marks inside": ARABIC.replace("ي", "\u200fي\u202b\u2067"),
    "byte order mark": "\ufeff" + ARABIC,
    "comma of thousands": ARABIC.replace("4000", "4,000"),
    "Arabic comma of thousands": ARABIC.replace("4000", "٤٬٠٠٠"),
    "space of thousands": ARABIC.replace("4000", "4\u202f000"),
    "plain space of thousands": ARABIC.replace("4000", "4 000"),
    "Arabic punctuation": "«" + ARABIC.replace(" من", "، من") + "؟؛»",
    "soft hyphen": ENGLISH.replace("hypertension", "hyper\u00adtension"),
    "zero-width space": ENGLISH.replace("treated", "treat\u200bed"),
    "word joiner": ENGLISH.replace("treated", "treat\u2060ed"),
    "full width": ENGLISH.replace("Is", "Ｉｓ").replace("4000", "４０００"),
    "ligature": ENGLISH.replace("first", "\ufb01rst"),
    "case and spaces": f"  {ENGLISH.upper()}\n",
    "curly marks": ENGLISH.replace("-", "\u2011"),
}


@pytest.mark.parametrize("spelling", SAME, ids=list(SAME))
def test_equal_spellings_are_one_text_for_contamination_and_duplicates(spelling):
    text = SAME[spelling]
    other = ARABIC if any("\u0600" <= letter <= "\u06ff" for letter in text) else ENGLISH
    assert normalise(text) == normalise(other)
    assert similarity(shingles(words(text)), shingles(words(other))) == 1
    language: Language = "ar" if other == ARABIC else "en"

    def record(name: str, asked: str) -> Record:
        turns = conversation(asked, "x")
        return Record(id=name, language=language, kind="qa", source="t", licence="l", conversations=turns)

    assert [found.by for found in overlaps([record("a", text)], [record("b", other)])] == ["question"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("10² cells", "102 cells"), ("2½ mg", "21 mg"), ("1.5 mg", "15 mg"), ("4000", "400"), ("سكر", "شكر"),
     ("10 20", "1020"), ("تاب", "ثاب")],
)  # fmt: skip
def test_different_texts_stay_different(one, other):
    assert normalise(one) != normalise(other)


WILD = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("ـًّٰٱأإآىیکےۀة٠۴٬٫،؛؟«»0123 .,\u200c\u200f\u00ad\u2060\u0301\u0345\u03b1ßİŉǰΐ²½ﷺﻻＡ"),
    ),
    max_size=40,
)


@given(WILD)
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)
    assert plain(plain(text)) == plain(text)


@given(WILD)
def test_no_word_becomes_empty(text):
    for word in text.split():
        # marks are no words, though Unicode calls tatweel and two small Quranic letters letters
        letters = [c for c in word if unicodedata.category(c)[0] in "LN" and c not in "ـۥۦ"]
        assert bool(normalise(word)) or not letters
        assert bool(plain(word)) or not letters


@given(st.lists(st.text(alphabet="ابتكيهةىأ0123456789abcXYZ", min_size=1), min_size=1), st.data())
def test_marks_and_punctuation_between_words_do_not_matter(found, data):
    marks = st.text(alphabet="،؛؟«»!.?()[]\"' \u200b\u200f\u064b\u0640\u00ad")
    written = "".join(f" {data.draw(marks)}{word}{data.draw(marks)} " for word in found)
    assert normalise(written) == normalise(" ".join(found))
