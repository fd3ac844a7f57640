"""Translations damaged on purpose, to measure how many the checks find.

Each kind of damage takes good pairs and yields damaged ones, with a seeded generator. If a kind needs something that a
text lacks (a dose, options), it is added to source and translation first, so that only the damage is measured.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bimedix_jax.curation.arabic import plain, sentences

Pair = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """A good pair, after additions, and its damaged translation."""

    source: str
    good: str
    damaged: str


# sentences with a dose in English and Arabic; {n} is the number, {u} the unit
_DOSE_TEXTS: tuple[Pair, ...] = (
    ("The patient was given {n} {u} of the drug intravenously.", "أعطي المريض {n} {u} من الدواء وريديا."),
    ("The usual dose is {n} {u}, taken after a meal.", "الجرعة المعتادة {n} {u} تؤخذ بعد الطعام."),
    ("She takes {n} {u} every morning.", "تتناول {n} {u} كل صباح."),
    ("An infusion of {n} {u} was started.", "بدأ تسريب {n} {u}."),
    ("Do not exceed {n} {u} in one day.", "لا تتجاوز {n} {u} في اليوم الواحد."),
)
# unit in English, its spellings in Arabic, the wrong units that replace it
_DOSE_UNITS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("mg", ("ملغ", "ملجم", "مجم", "ملّيغرام", "مليغرام", "mg"), ("ميكروغرام", "غرام", "كغ", "مل")),
    ("mcg", ("ميكروغرام", "مكغ", "ميكروجرام", "mcg", "µg"), ("ملغ", "ملليغرام", "غرام")),
    ("g", ("غرام", "جرام", "غ"), ("ملغ", "كغ", "ميكروغرام")),
    ("mL", ("مل", "مليلتر", "مللتر", "mL"), ("لتر", "ديسيلتر", "ملغ")),
    ("units", ("وحدة", "وحدات"), ("ملغ", "مل")),
    ("mmol", ("ملمول", "مليمول", "mmol"), ("ملغ", "ميكرومول")),
)
_DOSE_NUMBERS = (
    "2.5",
    "5",
    "7.5",
    "10",
    "12.5",
    "20",
    "25",
    "40",
    "50",
    "75",
    "100",
    "120",
    "250",
    "300",
    "500",
    "850",
    "1,000",
)

_OPTION_WORDS: tuple[Pair, ...] = (
    ("Iron deficiency", "نقص الحديد"),
    ("Viral hepatitis", "التهاب الكبد الفيروسي"),
    ("Pulmonary embolism", "الصمة الرئوية"),
    ("Gout", "النقرس"),
    ("Acute appendicitis", "التهاب الزائدة الحاد"),
    ("Hypothyroidism", "قصور الدرقية"),
    ("Kidney stones", "حصيات الكلية"),
    ("Bacterial meningitis", "التهاب السحايا الجرثومي"),
    ("Migraine", "الشقيقة"),
    ("Coeliac disease", "الداء البطني"),
    ("Asthma", "الربو"),
    ("Cataract", "الساد"),
)
_ARABIC_LABELS = "أبجدهو"
_BOILERPLATE = (
    "يرجى استشارة الطبيب قبل تناول أي دواء.",
    "هذه معلومات عامة ولا تغني عن زيارة الطبيب المختص.",
    "لمزيد من المعلومات راجع أقرب مركز صحي في منطقتك.",
)
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_EASTERN = str.maketrans("0123456789.,", "٠١٢٣٤٥٦٧٨٩٫٬")


def dropped_number(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """One number in digits is removed from the translation (possibly part of a name, such as the 19 of COVID-19)."""
    for source, good in pairs:
        found = list(_DIGITS.finditer(good))
        if found and _DIGITS.search(plain(source)):
            match = random_.choice(found)
            yield Case(source, good, good[: match.start()] + good[match.end() :])


def changed_number(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """One digit of the translation is changed."""
    for source, good in pairs:
        places = [place for place, character in enumerate(good) if character in "0123456789"]
        if places and _DIGITS.search(plain(source)):
            place = random_.choice(places)
            other = random_.choice([digit for digit in "123456789" if digit != good[place]])
            yield Case(source, good, good[:place] + other + good[place + 1 :])


def changed_dose(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """A dose is ten times too high or too low, has two digits swapped, or has another unit."""
    for source, good in pairs:
        english, arabic = random_.choice(_DOSE_TEXTS)
        number = random_.choice(_DOSE_NUMBERS)
        unit, spellings, others = random_.choice(_DOSE_UNITS)
        spelling = random_.choice(spellings)
        eastern = random_.random() < 0.3
        wrong_number, wrong_unit = number, spelling
        if random_.random() < 0.4:
            wrong_unit = random_.choice(others)
        else:
            wrong_number = _another(number, random_)

        def said(amount: str, name: str, arabic: str = arabic, eastern: bool = eastern) -> str:
            return arabic.format(n=amount.translate(_EASTERN) if eastern else amount, u=name)

        first = random_.random() < 0.3
        yield Case(
            _joined(source, english.format(n=number, u=unit), first),
            _joined(good, said(number, spelling), first),
            _joined(good, said(wrong_number, wrong_unit), first),
        )


def _another(number: str, random_: random.Random) -> str:
    value = float(number.replace(",", ""))
    digits = str(int(value))
    choices = [value * 10, value / 10]
    if len(set(digits.rstrip("0"))) > 1:
        choices.append(float(digits[1] + digits[0] + digits[2:]))
    return f"{random_.choice(choices):g}"


def _joined(text: str, sentence: str, first: bool) -> str:
    text = text.strip()
    if not first and text[-1:] not in tuple(".!?؟"):
        text += "."
    return f"{sentence} {text}" if first else f"{text} {sentence}"


def truncated(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """Only the first 10 to 40 % of the characters are kept, cut after a word."""
    for source, good in pairs:
        length = int(random_.uniform(0.1, 0.4) * len(good))
        head = good[: max(length, 1)]
        cut = head.rsplit(" ", 1)[0] if " " in head.strip() else head
        yield Case(source, good, cut.strip() or good[:1])


def left_in_english(pairs: Sequence[Pair], _: random.Random) -> Iterator[Case]:
    """The English source is returned as the translation."""
    for source, good in pairs:
        yield Case(source, good, source)


def half_left_in_english(pairs: Sequence[Pair], _: random.Random) -> Iterator[Case]:
    """The second half of the words is left in English."""
    for source, good in pairs:
        arabic, english = good.split(), source.split()
        if len(english) >= 8:
            half = arabic[: len(arabic) // 2] + english[len(english) // 2 :]
            yield Case(source, good, " ".join(half))


def repeated_sentence(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """A sentence is repeated one to three times, directly after itself or at the end."""
    for source, good in pairs:
        parts = sentences(good)
        if not parts or len(parts[0].split()) < 2:
            continue
        place, times = random_.randrange(len(parts)), random_.randint(1, 3)
        again = [parts[place]] * times
        if random_.random() < 0.5:
            repeated = [*parts[: place + 1], *again, *parts[place + 1 :]]
        else:
            repeated = [*parts, *again]
        yield Case(source, good, " ".join(repeated))


def boilerplate(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """All sources have the same sentence as translation."""
    sentence = random_.choice(_BOILERPLATE)
    for source, good in pairs:
        yield Case(source, good, sentence)


def lost_option(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """One of four or five options loses its line, its text, or its label (its text is then part of the line above)."""
    for source, good in pairs:
        chosen = random_.sample(_OPTION_WORDS, random_.choice((4, 5)))
        arabic_labels = _ARABIC_LABELS if random_.random() < 0.5 else "ABCDEF"
        mark = random_.choice((".", ")"))
        english = [f"{letter}{mark} {pair[0]}" for letter, pair in zip("ABCDEF", chosen, strict=False)]
        arabic = [f"{letter}{mark} {pair[1]}" for letter, pair in zip(arabic_labels, chosen, strict=False)]
        place = random_.randrange(len(arabic))
        damaged = list(arabic)
        how = random_.randrange(4)
        if how == 0 and place > 0:
            damaged[place - 1] += " " + chosen[place][1]
            del damaged[place]
        elif how == 1:
            damaged[place] = f"{arabic_labels[place]}{mark}"
        elif how == 2:  # later options get the labels of earlier ones
            left = [pair[1] for index, pair in enumerate(chosen) if index != place]
            damaged = [f"{letter}{mark} {text}" for letter, text in zip(arabic_labels, left, strict=False)]
        else:
            del damaged[place]
        source = "\n".join([source, *english])
        yield Case(source, "\n".join([good, *arabic]), "\n".join([good, *damaged]))


_DENIAL = re.compile(r"(?<!\w)و?(?:لا|لم|لن|ليس|ليست|غير|عدم|دون|بدون|بلا)\s+")
_DENIED = re.compile(r"\b(?:not|no|never|cannot|without)\b|n['’]t\b", re.IGNORECASE)


def dropped_negation(pairs: Sequence[Pair], _: random.Random) -> Iterator[Case]:
    """The only negation particle is removed, if the source has one `not`, `no`, `never`, `cannot` or `without`."""
    for source, good in pairs:
        if len(_DENIED.findall(source)) == 1 and len(_DENIAL.findall(plain(good))) == 1:
            yield Case(source, good, _DENIAL.sub("", plain(good)))


_DRUGS: tuple[Pair, ...] = (
    ("omeprazole", "أوميبرازول"),
    ("amoxicillin", "أموكسيسيلين"),
    ("metformin", "ميتفورمين"),
    ("warfarin", "وارفارين"),
    ("ibuprofen", "إيبوبروفين"),
    ("lisinopril", "ليزينوبريل"),
    ("atorvastatin", "أتورفاستاتين"),
    ("losartan", "لوسارتان"),
    ("ciprofloxacin", "سيبروفلوكساسين"),
    ("prednisone", "بريدنيزون"),
)


def replaced_drug(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """A sentence about a drug is added to both texts, with another drug in the translation, in either script."""
    for source, good in pairs:
        right, wrong = random_.sample(_DRUGS, 2)
        script = random_.randrange(2)
        english, arabic = f"Treatment with {right[0]} was started.", "بدأ العلاج بدواء {}."
        yield Case(
            _joined(source, english, False),
            _joined(good, arabic.format(right[script]), False),
            _joined(good, arabic.format(wrong[script]), False),
        )


def swapped(pairs: Sequence[Pair], random_: random.Random) -> Iterator[Case]:
    """Each source has the translation of another source, fluent but wrong. The judge model should find these."""
    shift = random_.randrange(1, max(2, len(pairs)))
    for place, (source, good) in enumerate(pairs):
        yield Case(source, good, pairs[(place + shift) % len(pairs)][1])


Damage = Callable[[Sequence[Pair], random.Random], Iterator[Case]]

BAR: dict[str, Damage] = {
    "dropped_number": dropped_number,
    "changed_dose": changed_dose,
    "truncated": truncated,
    "left_in_english": left_in_english,
    "repeated_sentence": repeated_sentence,
    "boilerplate": boilerplate,
    "lost_option": lost_option,
}
"""The seven kinds of damage of which at least 97 % must be found."""

ALSO: dict[str, Damage] = {
    "changed_number": changed_number,
    "half_left_in_english": half_left_in_english,
    "dropped_negation": dropped_negation,
    "replaced_drug": replaced_drug,
    "swapped": swapped,
}
"""Kinds of damage that are measured without a required share."""
