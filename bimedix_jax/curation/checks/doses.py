"""Doses and measures: a number with a unit in the source must have the same unit in the translation."""

import re
from collections import Counter
from dataclasses import dataclass

from bimedix_jax.curation.arabic import letters, plain
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.checks.numbers import Number, in_digits

# canonical name: English spellings | Arabic abbreviations and irregular words (regular ones: _METRIC)
_UNITS = """
mcg: mcg ug µg μg microgram micrograms microgramme | مكغ مكجم مكغم ميكغ ميكروغ ميكروغم ميكروجم
ng: ng nanogram nanograms | نغ
mg: mg mgs milligram milligrams milligramme | ملغ ملغم ملجم مغ مجم مليغ
kg: kg kgs kilogram kilograms kilo kilos | كغ كغم كجم كلغ كلجم كيلو
g: g gm gms gram grams gramme | غ غم جم
ml: ml mls cc milliliter milliliters millilitre millilitres | مل ملل ملي مليتر
dl: dl deciliter decilitre | دل ديسل
ul: ul µl μl microliter microlitre microliters | مكل
l: l liter liters litre litres | ل
IU: iu iu's | وحدةدولية وحداتدولية
U: unit units u | وحدة وحدات
mmol: mmol millimole millimoles mmols millimolar | ممول مليمولار ملليمولار
umol: umol µmol μmol micromole micromoles micromolar | مكمول ميكرومولار
mEq: meq milliequivalent milliequivalents | ملمكافئ
mmHg: mmhg mm-hg | مم-زئبق
mm: mm millimeter millimeters millimetre millimetres | مم ملم
cm: cm centimeter centimeters centimetre centimetres | سم
um: um µm μm micrometer micrometers micron microns | ميكرون
nm: nm nanometer nanometers nanometre | نم
Mm: megametre megameter megametres megameters | ميغامتر ميجامتر
km: km kilometer kilometers kilometre kilometres | كم
m: m meter meters metre metres | م أمتار
%: % percent percentage | % بالمئة بالمائة
C: °c ℃ celsius | °م ℃ مئوية سيلزيوس سلسيوس
F: °f ℉ fahrenheit | °ف ℉ فهرنهايت فهرنهايتية فهرنهيت
second: s sec secs second seconds | ثانية ثوان ثواني ثوانٍ ث ثانيتين
minute: min mins minute minutes | دقيقة دقائق دقيقتين د
hour: h hr hrs hour hours | ساعة ساعات ساعتين
day: d day days | يوم أيام يوما يومين
week: wk wks week weeks | أسبوع أسابيع أسبوعا أسبوعين
month: month months mo | شهر أشهر شهور شهرا شهرين
year: yr yrs year years | سنة سنوات عام أعوام عاما سنين سنتين عامين
tablet: tablet tablets tab tabs pill pills | قرص أقراص حبة حبات حبوب قرصا قرصين حبتين
capsule: capsule capsules | كبسولة كبسولات
drop: drop drops | قطرة قطرات قطرتين
"""
# units of amounts; with units of time and distance translators are freer (24 hours, a day)
_STRICT = frozenset("mcg ng mg kg g ml dl ul l IU U mmol umol mEq mmHg mm cm % C F tablet capsule drop".split())
# units that replace each other: a unit of insulin is an international unit, a capsule may be called a tablet
_ALIKE = {"IU": "U", "capsule": "tablet"}
# units that their capital letters tell apart: mM is millimoles in a litre, Mm are megametres
_BY_CASE = {"mM": "mmol", "µM": "umol", "μM": "umol", "uM": "umol", "Mm": "Mm"}
_REACH = 4
"""Most words between a number and its unit: `between 500 and 1000 mg`, `في المئة`."""


def _spellings() -> tuple[dict[str, str], dict[str, str]]:
    english: dict[str, str] = {}
    arabic: dict[str, str] = {}
    for line in _UNITS.strip().splitlines():
        name, rest = line.split(": ", 1)
        left, right = rest.split("|")
        english.update(dict.fromkeys(left.split(), name))
        arabic.update({letters(spelling): name for spelling in right.split()})
    return english, arabic


_ENGLISH, _ARABIC = _spellings()
# a symbol, a word, or a word that begins with °, µ or %
_WORD = re.compile(r"%|°\s?[CFcfمف]|[℃℉]|[µμ]?[^\W\d_]+(?:-[^\W\d_]+)?")
# Arabic spellings of prefixes and units: ملغرام, ملّيجرام, ميلليغرام, مايكروغرام, ... (after `letters`)
_METRIC = re.compile(
    "(ميكرو|مايكرو|مكرو|مي?ل{1,2}ي?|كيلو|نانو|سنتي?|ديسي)?([غج]رام|لي?تر|متر|مول|مكافء)(?:ا|ات|ان|ين)?"
)
_PREFIX = {"م": "m", "ك": "k", "ن": "n", "س": "c", "د": "d"}
_BASE = {"غ": "g", "ج": "g", "ل": "l", "مت": "m", "مو": "mol", "مك": "Eq"}
_NAMED = {"ug": "mcg", "Eq": "mEq"}
_LATIN_BEFORE = re.compile(r"[A-Za-z]\d")  # the 1 of S1 is not an amount
_DEGREES = re.compile(r"درج(?:ة|ات|ه)\s+مئوي[ةه]|degrees?\s+(?:celsius|centigrade|c\b)", re.IGNORECASE)
_JOINED = (
    (re.compile(r"وحد(?:ة|ات)\s+دولي[ةه]"), "وحدةدولية"),
    (re.compile(r"\b(?:international units?|i\.u\.)", re.IGNORECASE), "iu"),
    (re.compile(r"(?:ملم|مم|مي?ل?لي?متر|مي?ل?لي متر)[\s-]*(?:من\s+)?(?:ال)?زئبقي?"), "مم-زئبق"),
    (re.compile(r"\bmm\s?hg\b", re.IGNORECASE), "mmhg"),
    (re.compile(r"في\s+ال(?:مئ|مائ)[ةه]|بال(?:مئ|مائ)[ةه]"), "%"),
    (re.compile(r"\bper\s?cent\b", re.IGNORECASE), "%"),
    (re.compile(r"مي?ل?لي?\s*مكافئ"), "ملمكافئ"),
    (re.compile(r"مي?ل?لي\s+(?=غرام|جرام|لتر|ليتر|متر|مول)"), "ملي"),
    (re.compile(r"ميكرو\s+(?=غرام|جرام|لتر|ليتر|متر|مول)"), "ميكرو"),
    (re.compile(r"كيلو\s+(?=غرام|جرام|متر)"), "كيلو"),
    (_DEGREES, "°C"),
)


@dataclass(frozen=True)
class Measure:
    """A number and its unit (canonical name). `near` has all units within _REACH words of the number."""

    number: Number
    unit: str | None
    near: frozenset[str]


def check(source: str, translation: str) -> list[Flag]:
    """Flag measures that have another unit, or none, in the Arabic translation.

    If the number itself is missing, numbers.check flags it; here it is flagged only if the unit is missing too.
    """
    wanted = [measure for measure in measures(source, "en") if measure.unit is not None]
    if not wanted:
        return []
    given = measures(translation, "ar")
    wrong = []
    for measure in wanted:
        found = next((other for other in given if _same(measure, other)), None)
        if found is not None:
            given.remove(found)
            continue
        same_number = [other for other in given if other.number.same(measure.number)]
        if measure.unit in _STRICT and (same_number or not _mentions(translation, str(measure.unit))):
            units = sorted({other.unit or "no unit" for other in same_number})
            wrong.append(f"{measure.number.text} {measure.unit} became {', '.join(units) or 'nothing'}")
        elif any(other.unit is not None and other.unit in _STRICT for other in same_number):
            wrong.append(f"{measure.number.text} {measure.unit} became {same_number[0].unit}")
    wrong += _lost_denominators(source, translation)
    return [Flag(name="doses", detail="; ".join(wrong))] if wrong else []


def measures(text: str, language: str) -> list[Measure]:
    """Numbers in digits with the units that follow them, or precede them as in `النسبة المئوية: 5`."""
    text = _joined(text)
    free = (number for number in in_digits(text) if not _LATIN_BEFORE.match(text, max(0, number.start - 1)))
    return [_measure(number, text, language) for number in free]


def _measure(number: Number, text: str, language: str) -> Measure:
    table = _ENGLISH if language == "en" else _ARABIC
    after = text[number.end : number.end + 48]
    near: list[str] = []
    unit = None
    for count, match in enumerate(_WORD.finditer(after)):
        if count >= _REACH or re.search(r"[.;؛!?؟\n](?:\s|$)", after[: match.start()]):
            break
        abbreviation = len(match.group()) == 1 and after[match.end() : match.end() + 1] == "."  # U.S.
        name = None if abbreviation and re.match(r"\.[A-Z]", after[match.end() :]) else _name(match.group(), table)
        # a unit belongs to the number if only spaces, a hyphen or a bracket separate them
        if name and count == 0 and not after[: match.start()].strip(" \u00a0\u202f-‐‑–(["):
            unit = name
        if name:
            near.append(name)
    if language == "ar" and text[max(0, number.start - 2) : number.start].strip() == "%":
        unit = unit or "%"
    return Measure(number, unit, frozenset([*near, unit] if unit else near))


def _joined(text: str) -> str:
    text = plain(text)
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return text


def _name(word: str, table: dict[str, str]) -> str | None:
    key = word.replace(" ", "")
    if key in _BY_CASE:
        return _BY_CASE[key]
    if table is _ENGLISH and len(key) == 1 and key.isupper() and key not in "LU":
        return None  # 5G is not a weight, and 4 M is not a length
    key = letters(key).lower()
    # units of a translation may stay in Latin letters
    name = table.get(key) or (_ENGLISH.get(key) if key.isascii() or key[0] in "µμ°" else _metric(key))
    return name or (_name(key.split("-")[0], table) if "-" in key else None)


def is_unit(word: str) -> bool:
    """Whether a Latin word in lower case is a unit. Translations may keep units in Latin script."""
    return word in _ENGLISH


def _metric(word: str) -> str | None:
    """The canonical name of a metric unit spelled out in Arabic."""
    match = _METRIC.fullmatch(word)
    if match is None:
        return None
    base = _BASE.get(match[2][0]) or _BASE[match[2][:2]]
    prefix = "" if not match[1] else "u" if match[1].endswith("كرو") else _PREFIX[match[1][0]]
    return _NAMED.get(prefix + base, prefix + base)


def _alike(unit: str | None) -> str | None:
    return _ALIKE.get(unit, unit) if unit else None


def _same(wanted: Measure, other: Measure) -> bool:
    if not wanted.number.same(other.number):
        return False
    if other.unit is not None:
        return _alike(other.unit) == _alike(wanted.unit)
    return _alike(wanted.unit) in {_alike(unit) for unit in other.near} or not _STRICT & {str(wanted.unit)}


def _mentions(text: str, unit: str) -> bool:
    """Whether a text contains a unit as a word anywhere: `half a gram`, `gram for gram`."""
    return _alike(unit) in {_alike(_name(match.group(), _ARABIC)) for match in _WORD.finditer(_joined(text))}


def _lost_denominators(source: str, translation: str) -> list[str]:
    """Denominators such as the `/kg` of `mg/kg` that are missing in the translation."""
    wanted = Counter(
        name
        for match in re.finditer(r"(?<=[A-Za-z])/(\d*[A-Za-zµμ]+)", _joined(source))
        if (name := _ENGLISH.get(match.group(1).lower())) in ("kg", "ml", "dl", "l")
        and re.search(r"\d\s?[A-Za-zµμ]+$", _joined(source)[: match.start()])
    )
    given = Counter(_name(match.group(), _ARABIC) for match in _WORD.finditer(_joined(translation)))
    return [f"/{name} is lost" for name, count in wanted.items() if not given[name] and count]
