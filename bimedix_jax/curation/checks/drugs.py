"""Drug names: each name in the source must be in the translation, in Latin script or transliterated to Arabic.

Drugs are recognised by the stems of international nonproprietary names (WHO, "The use of stems in the selection of
INN") and by a short list of common names without such a stem. Transliterations are compared by their consonants.
"""

import re
from difflib import SequenceMatcher

from bimedix_jax.curation.arabic import ARABIC_LETTER, letters, plain, stems
from bimedix_jax.curation.checks.flags import Flag

_STEM = re.compile(
    r"(?i)\b[a-z]{2,}(?:mab|tinib|ciclib|pril|prilat|sartan|olol|alol|statin|conazole|prazole|bendazole|nidazole|cillin|"
    r"mycin|micin|floxacin|cycline|penem|oxacin|bactam|vir|buvir|vudine|dipine|oxetine|azepam|zolam|azepine|triptan|"
    r"gliptin|gliflozin|glitazone|glutide|parin|xaban|gatran|caine|semide|thiazide|tidine|setron|profen|coxib|fenac|"
    r"oxicam|sone|solone|nisone|terol|tropium|phylline|lukast|dronate|platin|rubicin|taxel|tecan|trexate|stigmine|"
    r"curonium|curium|barbital|pramine|triptyline|apine|peridol|peridone|piprazole|tretinoin|fibrate|"
    r"quine|quinine|relin|tide|poetin|poietin|grastim|kinra|mustine|fungin|terfenadine|azosin|glinide|formin)\b|\b(?:cef|ceph|sulfa)[a-z]{4,}\b"
)
# words with such a stem that are not drugs (found in MedQuAD, MedMCQA, MedQA and PubMedQA)
_NO_DRUG = re.compile(
    r"cholesterol$|nucleotides?$|peptides?$|^cephal(?!exin|othin)|^sulfat|^sulfide|histidine|ectropium|^someone$|^person$|"
    r"^(?:medi|vac)cine$|^feline$|^saline$|^cyclone$|^crimson$|^blossom$|^reason$|^season$|^lesson$|^elixir$"
)
_COMMON = re.compile(
    r"(?i)\b(?:aspirin|paracetamol|acetaminophen|ibuprofen|naproxen|insulin|warfarin|heparin|digoxin|metformin|morphine|"
    r"codeine|tramadol|fentanyl|lithium|clozapine|phenytoin|valproate|levetiracetam|gabapentin|pregabalin|amiodarone|"
    r"nitroglycerin|epinephrine|adrenaline|norepinephrine|noradrenaline|dopamine|atropine|naloxone|methadone|"
    r"levothyroxine|methotrexate|colchicine|allopurinol|tamoxifen|cyclosporine|tacrolimus|rifampi[nc]|"
    r"isoniazid|ethambutol|pyrazinamide|dapsone|vancomycin|gentamicin|chloramphenicol|ivermectin|remdesivir|"
    r"albuterol|salbutamol|spironolactone|mannitol|ketamine|propofol|diazepam|clopidogrel|hydralazine|clonidine|"
    r"sildenafil|finasteride|mesalamine|loperamide|metoclopramide|ondansetron|domperidone|chlorpromazine|haloperidol|"
    r"lidocaine|dextromethorphan|guaifenesin|prednisone|hydrocortisone|sertraline|verapamil|trimethoprim|quinine|"
    r"nitroprusside|buprenorphine|ziprasidone|bupropion|baclofen|misoprostol|oxytocin|terbinafine|permethrin)\b"
)
# drugs with a second name, which Arabic texts use
_ALSO = {
    "acetaminophen": ("paracetamol", "بانادول"),
    "albuterol": ("salbutamol",),
    "epinephrine": ("adrenaline",),
    "norepinephrine": ("noradrenaline",),
    "meperidine": ("pethidine",),
    "rifampin": ("rifampicin",),
    "nitroglycerin": ("glyceryl trinitrate", "نتروغليسرين"),
    "lithium": ("ليثيوم",),
    "aspirin": ("acetylsalicylic",),
    "cyclosporine": ("ciclosporin",),
}
SIMILAR = 0.8
"""Least share of common consonants of a Latin name and its Arabic transliteration. All 139 usual spellings of 119 names
have at least 0.88; so do 0.4 % of the wrong pairs."""

_CONSONANTS = {
    **dict.fromkeys("بپ", "b"), **dict.fromkeys("فڤ", "f"), **dict.fromkeys("تطثدذضظ", "t"),
    **dict.fromkeys("سزصش", "s"), **dict.fromkeys("جغقكخگ", "k"),
    "ل": "l", "م": "m", "ن": "n", "ر": "r", "ه": "h", "ح": "h",
}  # fmt: skip
_LATIN_CONSONANTS = {
    **dict.fromkeys("bp", "b"), **dict.fromkeys("fv", "f"), **dict.fromkeys("td", "t"), **dict.fromkeys("sz", "s"),
    **dict.fromkeys("ckqgj", "k"), "l": "l", "m": "m", "n": "n", "r": "r", "h": "h", "x": "ks",
}  # fmt: skip


def names(text: str) -> list[str]:
    """Distinct drug names of an English or mixed text, in lower case and in order."""
    found = [*_STEM.finditer(text), *_COMMON.finditer(text)]
    ordered = (match.group().lower() for match in sorted(found, key=lambda match: match.start()))
    return [name for name in dict.fromkeys(ordered) if len(name) > 4 and not _NO_DRUG.search(name)]


def also(name: str) -> tuple[str, ...]:
    """Other names of a drug, in either direction."""
    return (*_ALSO.get(name, ()), *(first for first, others in _ALSO.items() if name in others))


def check(source: str, translation: str) -> list[Flag]:
    """Flag drugs that are missing in the translation in either script, and new drug names in Latin script."""
    wanted = names(source)
    text = plain(translation)
    latin = {word.lower() for word in re.findall(r"[A-Za-z][A-Za-z\-]+", text)}
    missing = []
    if wanted:
        forms = spelled(text)
        missing = [name for name in wanted if name not in latin and not _is_spelled(name, forms)]
    known = {word.lower() for word in re.findall(r"[A-Za-z][A-Za-z\-]+", source)}
    known |= {other for name in known for other in _ALSO.get(name, ())}
    new = [name for name in names(text) if name not in known]
    flags = []
    if missing:
        flags.append(Flag(name="drug_names", detail=f"missing: {', '.join(missing)}"))
    if new:
        flags.append(Flag(name="drug_names", detail=f"not in the source: {', '.join(new)}"))
    return flags


def spelled(text: str) -> set[str]:
    """Consonants of each Arabic word, with and without prefixes, and of each two consecutive words."""
    arabic = [letters(word) for word in re.findall(r"\w+", text) if ARABIC_LETTER.search(word)]
    single = {skeleton(stem) for word in arabic for stem in stems(word)}
    pairs = {
        skeleton(one + other)
        for a, b in zip(arabic, arabic[1:], strict=False)
        for one in stems(a)
        for other in (b, b.removeprefix("ال"))
    }
    return single | pairs


def _is_spelled(name: str, spelled: set[str]) -> bool:
    return any(
        SequenceMatcher(None, own, other, autojunk=False).ratio() >= SIMILAR
        for own in map(skeleton, (name, *_ALSO.get(name, ())))
        for other in spelled
        if own and other and 0.5 <= len(other) / len(own) <= 2 and own[0] == other[0]
    )


def skeleton(word: str) -> str:
    """Consonants of a Latin or Arabic word, in classes common to both scripts. Doubled consonants count once."""
    if ARABIC_LETTER.search(word):
        found = "".join(_CONSONANTS.get(character, "") for character in word)
    else:
        word = word.lower().replace("ph", "f").replace("th", "t").replace("ch", "k").replace("sh", "s")
        word = re.sub(r"c(?=[eiy])", "s", word).replace("qu", "k")
        found = "".join(_LATIN_CONSONANTS.get(character, "") for character in word)
    return re.sub(r"(.)\1+", r"\1", found)
