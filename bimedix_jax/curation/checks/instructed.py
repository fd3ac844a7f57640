"""Detect a model that followed the instructions in a text, or commented on it, instead of translating it."""

import re

from bimedix_jax.curation.arabic import plain, words
from bimedix_jax.curation.checks.flags import Flag

# phrases of a model before, after or instead of a translation; medical texts do not begin with them
_TALK = re.compile(
    r"^\s*(?:sure\b|certainly\b|of course\b|here(?:'s| is)\b|okay\b|as an ai\b|i(?:'m| am) sorry\b|i can(?:no|')t\b|"
    r"translation\s*:|arabic\s*:|إليك(?:م)?\s+(?:ال)?ترجم|اليك\s+(?:ال)?ترجم|(?:ال)?ترجمة(?:\s+\S+){0,3}\s*:|"
    r"بالتأكيد\s*[،,!:.]|بالطبع\s*[،,!:.]|حسن[اً]+\s*[،,!:.]|النص\s+(?:المترجم|بالعربية)\s*:?)"
    r"|بصفتي\s+(?:نموذج|ذكاء)|كنموذج\s+(?:لغة|لغوي)|بصفتي\s+مساعد|نموذج\s+لغوي\s+كبير|as an ai\b|language model\b|"
    r"(?:لا\s+يمكنني|لا\s+أستطيع|لا\s+استطيع)\s+(?:مساعدتك|ترجمة|تقديم|الإجابة|الاجابة)|```|<\|?\w+\|?>\s*$|"
    r"ملاحظة\s+(?:المترجم|الترجمة)|\btranslator'?s note\b",
    re.IGNORECASE,
)
_TALKED_ABOUT = re.compile(
    r"\b(?:sure|certainly|of course|here|okay|sorry|translat\w+|language model|AI|cannot|can['’]?t|unable|notes?|well|"
    r"fine|all right|alright|ok|naturally|indeed|definitely)\b|```|<\|?\w+",
    re.IGNORECASE,
)
_SCORE = re.compile(r"\b\d{1,3}\s*/\s*100\b|[\"'](?:score|translation|rating)[\"']\s*:|^\s*\{", re.IGNORECASE)

# instructions to a model inside a text (injected or by accident), and words that their translation must have
_ORDERS: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (re.compile(order, re.IGNORECASE), re.compile(rendered))
    for order, rendered in (
        (
            r"\b(?:ignore|disregard|forget)\b.{0,40}\b(?:instructions?|prompts?|rules|above|previous|everything)\b",
            "تجاهل|تغاض|أهمل|اهمل|إهمال|انس|تناس|اطرح",
        ),
        (r"\b(?:do not|don['’]?t|instead of) translat\w+", "ترجم"),
        (r"\btranslate (?:this|the|it|into|to)\b", "ترجم"),
        (
            r"\byou are (?:now )?(?:a|an|the)\b.{0,40}\b(?:model|assistant|chatbot|AI|translator|judge)\b",
            "أنت|انت|إنك|انك",
        ),
        (
            r"\b(?:output|print|return|write|reply|respond|answer)\b (?:only|with|just|exactly)\b",
            "فقط|أخرج|اطبع|أعد|اكتب|رد|أجب|أجيب|استجب|بال",
        ),
        (r"\b(?:system|developer) (?:prompt|message)\b", "النظام|المطور|التوجيه|الموجه|رسالة"),
        (
            r"\b(?:give|assign|award|rate|score) (?:this|the|it|me|us|a)\b.{0,40}\b(?:scores?|100|full marks|points)\b",
            "درج|نقاط|نقط|قيم|تقييم|امنح|أعط|اعط",
        ),
    )
)
_ASKS = frozenset(
    "هل ما ماذا متي اين كيف كم اي ايه من لماذا لم مم عم بماذا ماهي ماهو فهل وهل وما فما ومتي وكيف وكم واي لاي باي لمن "
    "وماذا فماذا ايهما اليس الا ايا مالذي ماالذي بكم لكم فيم فيما عما ممن لمن بمن علام الام حتام".split()
)
_IMPERATIVE = re.compile(
    r"^\s*(?:please\s+)?(?:write|list|name|summari[sz]e|explain|describe|discuss|compare|give|provide|generate|create|"
    r"suggest|outline|define|identify)\b",
    re.IGNORECASE,
)
_ARABIC_IMPERATIVE = re.compile(
    r"^\W*(?:و?(?:رجاء\S*|من\s+فضلك\S*|يرجى|الرجاء|لطفا\S*)\W*)?(?:اكتب|أكتب|اذكر|أذكر|عدد|سرد|اسرد|سم|لخص|اشرح|وضح|صف|"
    r"ناقش|قارن|أعط|اعط|قدم|أنشئ|انشئ|ولد|اقترح|حدد|عرف|بين|ضع|كتابة|ذكر|تلخيص|شرح|وصف|مناقشة|مقارنة|إعطاء|تقديم|إنشاء|"
    r"اقتراح|تحديد|تعريف|استعرض|تحدث|هات|صغ)"
)


def check(source: str, translation: str) -> list[Flag]:
    """Flag an Arabic translation that answers, comments on or scores its English source."""
    source, translation = plain(source), plain(translation)
    talk = _TALK.search(translation)
    if talk and not _TALKED_ABOUT.search(source):
        return [_flag(f"it comments on the task: {talk.group().strip()}")]
    score = _SCORE.search(translation)
    if score and not _SCORE.search(source):
        return [_flag(f"it contains a score or a wrapper: {score.group().strip()}")]
    for order, rendered in _ORDERS:
        found = order.search(source)
        if found and not rendered.search(translation):
            return [_flag(f"{found.group()!r} is not translated")]
    if _IMPERATIVE.search(source) and not _ARABIC_IMPERATIVE.search(translation) and _far_longer(source, translation):
        return [_flag("the task in the text was carried out, not translated")]
    if _is_one_question(source) and not _asks(translation):
        return [_flag("the question became a statement")]
    return []


def _is_one_question(source: str) -> bool:
    text = source.strip()
    return text.endswith("?") and not re.search(r"[.!;:\n]\s", text)


def _asks(translation: str) -> bool:
    if re.search(r"[?؟]", translation) or _ASKS & set(words(translation)):
        return True
    return bool(_ARABIC_IMPERATIVE.search(translation))  # name two examples of ...


def _far_longer(source: str, translation: str) -> bool:
    return len(translation) > 1.5 * len(source)


def _flag(detail: str) -> Flag:
    return Flag(name="instruction_obeyed", detail=detail)
