"""Negations that were lost in a translation, or added.

The two languages negate too differently for a comparison word by word (`unless`, `too weak to`, `no sooner`). Only
clear cases are flagged: a plain `not` or `no` in a source whose translation has no negation, and an Arabic negation if
no English word can explain it.
"""

import re

from bimedix_jax.curation.arabic import letters, plain, stems, words
from bimedix_jax.curation.checks.flags import Flag

# plain negations
_PLAIN = re.compile(
    r"\b(?:no|not|never|none|cannot|nor|neither|nobody|nothing|nowhere|without)\b|n['’]t\b|\b(?:dont|doesnt|didnt|cant|"
    r"isnt|arent|wasnt|wont|havent|hasnt|shouldnt)\b",
    re.IGNORECASE,
)
# phrases that look like a negation but are not, or that Arabic expresses without a particle
_NOT_DENYING = re.compile(
    r"\bnot only\b|\bwhether or not\b|\bor not\b|\bif not\b|\bno\.\s?\d|\bno (?:later|sooner|fewer|less) than\b|"
    r"\bcould\s?n[o'’]?t (?:be )?(?:more|agree|help)\b|\bno longer\b|\bnot to mention\b|\bno matter\b|"
    r"\bwhy (?:not|don['’]t)\b|\bnot (?:until|just|merely|necessarily)\b|"
    r"(?:isn|aren|doesn|don|didn|won|hasn|haven|wasn|can|couldn|shouldn)['’]t (?:you|it|he|she|they|we|i)\b",
    re.IGNORECASE,
)
# English words that may be translated with an Arabic negation
_MAY_DENY = re.compile(
    r"\b(?:un|in|im|ir|il|non|dis|a|anti|de|mis)-?\w{3,}|\b\w+(?:less|free)\b|\b(?:few|little|hardly|scarcely|barely|"
    r"rarely|seldom|lack\w*|absen\w+|fail\w*|avoid\w*|prevent\w*|refus\w*|den(?:y|ied|ies)|stop\w*|only|rather|instead|"
    r"except|but|unless|until|before|beyond|otherwise|other|than|too|yet|still|even|exclud\w+|refrain\w*|free|out|off|"
    r"negative\w*|no-\w+|minus|zero|any|ever|or|poor\w*|low\w*|at least|least|just|despite|although|though|"
    r"regardless|irrespective|however|miss\w*|lose|loss|lost|ban\w*|prohibit\w*|forbid\w*|against|ignor\w*|neglect\w*|"
    r"remain\w*|keep\w*|always|must|necess\w*|all|every\w*|sure|may|might|far|away|doubt\w*|contra\w*|opposed|oppos\w+|"
    r"fewer|less|limit\w*|cease\w*|quit\w*|restrict\w*|short\w*|y/n|yes|minim\w+|stay\w*|hold\w*|differ\w*|exceed\w*|"
    r"up to|exempt\w*|waiv\w*|resist\w*|void|nil|null|non|so|such)\b",
    re.IGNORECASE,
)

# negating particles and nouns, compared after removing attached articles, conjunctions and pronouns
_PARTICLES = frozenset(
    map(
        letters,
        "لا لم لن ليس ليست ليسوا ليسا لسن لست لسنا لستم غير دون بدون عدم بلا كلا ولا لولا سوى إلا ألا لئلا كيلا أبدا "
        "نادرا قلما مطلقا مستحيل".split(),
    )
)
_PRONOUN = re.compile(r"(?<=..)(?:ها|هما|هم|هن|ه|ك|كم|ي|نا)$")
# verbs and nouns that can express a negation: to fail, be unable, refuse, prevent, avoid, lack, exclude, be absent
_ROOTS = re.compile(
    "عجز|عاجز|[ايت]خفق|اخفاق|فشل|رفض|تعذر|استحال|امتن|متنع|حظر|منوع|تجنب|تفاد|عدام|نعدم|عديم|خالي|[يت]خلو|فاقد|فقدان|"
    "فتقر|فتقار|استبع|استثن|ينف|نفي|غياب|غائب|صعب|بعيد|نادر|محال|مجهول|غموض|غامض"
)
_STRONG = frozenset(map(letters, "لا لم لن ليس ليست ليسوا لست لسنا".split()))
_STRONG_NOT_DENYING = re.compile(
    r"\b[وف]?(?:لا\s+(?:سيما|بأس|باس|شك|بد|يزال|تزال|زال|يزالون|مفر|محالة|سيّما)|لم\s+[يت]زل|ألا\s+وه)"
)


def check(source: str, translation: str) -> list[Flag]:
    """Flag a negation that the Arabic translation lost or added."""
    source, translation = plain(source), plain(translation)
    denials = [match.group() for match in _PLAIN.finditer(_NOT_DENYING.sub(" ", source))]
    if denials and not any(_denies(word) for word in words(_STRONG_NOT_DENYING.sub(" ", translation))):
        return [Flag(name="negations", detail=f"{denials[0]!r} is not translated")]
    arabic = words(_STRONG_NOT_DENYING.sub(" ", translation))
    added = [word for word in arabic if word in _STRONG or (word[:1] in "وف" and word[1:] in _STRONG)]
    if added and not denials and not _PLAIN.search(source) and not _MAY_DENY.search(source):
        return [Flag(name="negations", detail=f"the source has no negation for {added[0]!r}")]
    return []


def _denies(word: str) -> bool:
    if _ROOTS.search(word):
        return True
    return any(stem in _PARTICLES or _PRONOUN.sub("", stem) in _PARTICLES for stem in stems(word))
