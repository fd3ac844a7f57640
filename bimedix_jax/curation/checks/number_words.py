"""Numbers spelled as words in English and Arabic: cardinals, ordinals, scales, months, and the Arabic dual."""

import re
from dataclasses import dataclass

from bimedix_jax.curation.arabic import WORD, letters, stems, words


@dataclass(frozen=True)
class Spelled:
    """A number in words and its possible values."""

    text: str
    readings: frozenset[float]
    decade: bool = False


def _table(text: str) -> dict[str, float]:
    """Parse entries `5 five fifth`, separated by lines or semicolons, to word -> number. Applies `letters`."""
    found: dict[str, float] = {}
    for row in re.split(r"[;\n]", text):
        value, *names = row.split()
        found.update({letters(name): float(value) for name in names})
    return found


_ENGLISH = _table(
    "0 zero;1 one first once single;2 two second twice both double pair couple;3 three third thirds thrice triple;"
    "4 four fourth;5 five fifth;6 six sixth;7 seven seventh;8 eight eighth;9 nine ninth;10 ten tenth;"
    "11 eleven eleventh;12 twelve twelfth dozen;13 thirteen thirteenth;14 fourteen fourteenth fortnight;"
    "15 fifteen fifteenth;16 sixteen sixteenth;17 seventeen seventeenth;18 eighteen eighteenth;"
    "19 nineteen nineteenth;20 twenty twentieth;30 thirty thirtieth;40 forty fortieth;50 fifty fiftieth;"
    "60 sixty sixtieth;70 seventy;80 eighty;90 ninety;0.5 half;0.25 quarter quarters"
)
_ENGLISH_SCALE = _table(
    "100 hundred hundreds;1000 thousand thousands;1000000 million millions mn;1000000000 billion billions bn;"
    "1000000000000 trillion trillions"
)
_ENGLISH_MONTH = _table(
    "1 january jan;2 february feb;3 march mar;4 april apr;5 may;6 june jun;7 july jul;8 august aug;"
    "9 september sept sep;10 october oct;11 november nov;12 december dec"
)
_ENGLISH_DECADE = _table(
    "20 twenties;30 thirties;40 forties;50 fifties;60 sixties;70 seventies;80 eighties;90 nineties"
)

_ARABIC_UNIT = _table(
    "0 صفر;1 واحد واحدة واحدا أول أولى أولا أحد أحدا إحدى;"
    "2 اثنان اثنين اثنا اثني اثنتان اثنتين اثنتا اثنتي ثاني ثانية ثان ثانيا كلا كلتا;"
    "3 ثلاث ثلاثة ثلاثا ثالث ثالثة ثالثا ثلث;4 أربع أربعة أربعا رابع رابعة رابعا;"
    "5 خمس خمسة خمسا خامس خامسة خامسا;6 ست ستة ستا سادس سادسة سادسا;"
    "7 سبع سبعة سبعا سابع سابعة;8 ثمان ثماني ثمانية ثمانيا ثامن ثامنة;9 تسع تسعة تسعا تاسع تاسعة;"
    "10 عشر عشرة عشرا عاشر عاشرة;"
    "11 حادي حادية;0.5 نصف;0.25 ربع"
)
_ARABIC_TEN = _table(
    "20 عشرون عشرين;30 ثلاثون ثلاثين;40 أربعون أربعين;50 خمسون خمسين;60 ستون ستين;70 سبعون سبعين;"
    "80 ثمانون ثمانين;90 تسعون تسعين"
)
_ARABIC_SCALE = _table(
    "100 مئة مائة مية مئات;200 مئتان مئتين مائتان مائتين مئتا مئتي مائتي;1000 ألف آلاف ألفا ألوف;"
    "2000 ألفان ألفين ألفي;1000000 مليون ملايين مليونا;2000000 مليونان مليونين مليوني;"
    "1000000000 مليار مليارات بليون;2000000000 مليارين ملياري;1000000000000 تريليون تريليونات"
)
_ARABIC_HUNDREDS = _table(
    "300 ثلاثمئة ثلاثمائة;400 أربعمئة أربعمائة;500 خمسمئة خمسمائة;600 ستمئة ستمائة;700 سبعمئة سبعمائة;"
    "800 ثمانمئة ثمانمائة ثمانيمائة;900 تسعمئة تسعمائة"
)
_ARABIC_MONTH = _table(
    "1 يناير;2 فبراير شباط;3 مارس آذار;4 أبريل إبريل نيسان;5 مايو أيار;6 يونيو يونيه حزيران;7 يوليو يوليه تموز;"
    "8 أغسطس آب;9 سبتمبر أيلول;10 أكتوبر;11 نوفمبر;12 ديسمبر"
)
_MONTH_OF_TWO_WORDS = {
    ("كانون", "ثاني"): 1.0,
    ("تشرين", "اول"): 10.0,
    ("تشرين", "ثاني"): 11.0,
    ("كانون", "اول"): 12.0,
}
_ARABIC_DECADE = _table("20 عشرين;30 ثلاثين;40 أربعين;50 خمسين;60 ستين;70 سبعين;80 ثمانين;90 تسعين")
_DECADE = re.compile(r"(.+?)(?:ي?ات)$")

# nouns that are often counted; their dual form means "two"
_COUNTED = (
    "يوم أسبوع شهر سنة عام ساعة دقيقة ثانية مرة متر قدم كيلومتر سنتيمتر مليمتر غرام جرام كيلوغرام كيلوجرام مليغرام "
    "ملليغرام مليلتر لتر وحدة جرعة قرص حبة كبسولة قطرة ملعقة كوب بخة حقنة درجة ضعف مريض شخص طفل حالة نوع جزء مرحلة "
    "خطوة مجموعة جلسة دراسة تجربة مليون ليلة عقد قرن بلد دولة مدينة عينة"
)
_SINGULAR = {
    "day": "يوم",
    "week": "أسبوع",
    "month": "شهر",
    "year": "سنة عام",
    "hour": "ساعة",
    "minute": "دقيقة",
    "time": "مرة",
    "dose": "جرعة",
    "tablet": "قرص",
    "capsule": "كبسولة",
    "drop": "قطرة",
    "person": "شخص",
    "case": "حالة",
    "mile": "ميل",
    "inch": "بوصة إنش",
    "foot": "قدم",
    "pound": "رطل",
    "litre": "لتر",
    "liter": "لتر",
    "cup": "كوب",
    "unit": "وحدة",
    "child": "طفل",
    "patient": "مريض",
    "metre": "متر",
    "meter": "متر",
}


def _duals() -> frozenset[str]:
    found: set[str] = set()
    for noun in map(letters, _COUNTED.split()):
        base = noun[:-1] + "ت" if noun.endswith("ه") else noun
        found |= {base + ending for ending in ("ان", "ين", "ا", "ي", "يه", "يهما")}
    return frozenset(found)


_DUALS = _duals()
_PER_CENT = frozenset(map(letters, "المئة المائة بالمئة بالمائة".split()))


def scale(word: str) -> float | None:
    """The factor of a scale word (million, ألف, ملايين, ...), None for any other word."""
    word = letters(word).lower()
    if word in _PER_CENT:
        return None
    return _ENGLISH_SCALE.get(word) or next((_ARABIC_SCALE[s] for s in stems(word) if s in _ARABIC_SCALE), None)


def has_singular(noun: str, translation: str) -> bool:
    """Whether the Arabic text has the singular of an English noun of time or measure."""
    wanted = {letters(word) for word in _SINGULAR.get(noun.removesuffix("s"), "").split()}
    wanted |= {word + "ا" for word in wanted}  # the accusative
    return any(stem in wanted for word in words(translation) for stem in stems(word))


def english(text: str) -> list[Spelled]:
    """Number words of an English text. A compound (twenty-four, two hundred) is one number."""
    found: list[Spelled] = []
    group: list[tuple[str, float]] = []

    def close() -> None:
        if group:
            found.append(_group([word for word, _ in group], [value for _, value in group]))
            group.clear()

    for word in re.findall(r"[a-z]+|\S", text.lower()):
        if word in _ENGLISH or (word in _ENGLISH_SCALE and group):
            group.append((word, _ENGLISH.get(word) or _ENGLISH_SCALE.get(word, 0.0)))
            continue
        if word in ("-", "and") and group:
            continue
        close()
        if word in _ENGLISH_MONTH:
            found.append(Spelled(word, frozenset({_ENGLISH_MONTH[word]})))
        elif word in _ENGLISH_DECADE:
            found.append(Spelled(word, frozenset({_ENGLISH_DECADE[word]}), decade=True))
        elif word in _ENGLISH_SCALE:
            found.append(Spelled(word, frozenset({_ENGLISH_SCALE[word]})))
    close()
    return found


def arabic(text: str) -> list[Spelled]:
    """Number words, months and duals (as 2) of an Arabic text after `plain`. A compound is one number."""
    found: list[Spelled] = []
    group: list[tuple[str, float]] = []

    def close() -> None:
        if group:
            found.append(_group([word for word, _ in group], [value for _, value in group]))
            group.clear()

    previous = ""
    for raw in WORD.findall(text):
        word = letters(raw)
        month = _MONTH_OF_TWO_WORDS.get((previous, word.removeprefix("ال")))
        value = _arabic_value(word)
        if month is not None:
            close()
            found.append(Spelled(f"{previous} {raw}", frozenset({month})))
        elif value is not None:
            if group and not _continues(group[-1][1], value, word):
                close()
            group.append((raw, value))
        else:
            close()
            found += _other_arabic(raw, word)
        previous = word
    close()
    return found


def duals(text: str) -> int:
    """How many words of an Arabic text may be duals (or regular plurals). Each may be the translation of a `two`."""
    return sum(len(word) >= 5 and word.endswith(("ان", "ين", "اه", "يه")) for word in words(text))


def _arabic_value(word: str) -> float | None:
    if word in _PER_CENT:
        return None
    for stem in stems(word):
        for table in (_ARABIC_UNIT, _ARABIC_TEN, _ARABIC_HUNDREDS, _ARABIC_SCALE):
            if stem in table:
                return table[stem]
    return None


def _continues(before: float, value: float, word: str) -> bool:
    """Whether a number word continues the one before it: `أربعة عشر`, `خمسة وعشرون`, `ثلاثة آلاف`, `ألف ومئة`."""
    if value == 10:
        return before < 10
    return value >= 100 or (word.startswith("و") and (value >= 20 or before >= 20))


def _other_arabic(raw: str, word: str) -> list[Spelled]:
    """The number in a word that is a month, a decade or a dual; empty for other words."""
    for stem in stems(word):
        if stem in _ARABIC_MONTH:
            return [Spelled(raw, frozenset({_ARABIC_MONTH[stem]}))]
        if stem in _DUALS:
            return [Spelled(raw, frozenset({2.0}))]
        decade = _DECADE.match(stem)
        if decade and decade.group(1) in _ARABIC_DECADE:
            return [Spelled(raw, frozenset({_ARABIC_DECADE[decade.group(1)]}), decade=True)]
    return []


def _group(names: list[str], values: list[float]) -> Spelled:
    """Consecutive number words: the compound value, and the value of each word."""
    total, current = 0.0, 0.0
    for value in values:
        if value >= 1000:
            total += max(current, 1.0) * value
            current = 0.0
        elif value == 100:
            current = max(current, 1.0) * value
        else:
            current += value
    return Spelled(" ".join(names), frozenset({total + current, *values}))
