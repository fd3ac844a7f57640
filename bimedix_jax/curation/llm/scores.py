"""Reads scores from 0 to 100 as judges write them: 85, 87.5, "85/100", "٨٥", "٨٧٫٥ %"."""

import math
import re

_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹٫٪", "01234567890123456789.%")
_SCORE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(?:%|/\s*100|من\s*100|out of 100)?", re.ASCII)

LOWEST, HIGHEST = 0.0, 100.0


def parse_score(value: object) -> float | None:
    """The score in a judge's `score` field, or None.

    The whole field must be a score, so that one quoted from the judged text ("the source says 100/100") does not count.
    Values outside 0-100, on another scale ("8.5/10"), booleans and NaN give None. None is never accepted.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        number = float(value)
    elif isinstance(value, str):
        match = _SCORE.fullmatch(value.translate(_DIGITS).strip().rstrip(".").casefold())
        if match is None:
            return None
        number = float(match[1])
    else:
        return None
    return number if math.isfinite(number) and LOWEST <= number <= HIGHEST else None


def why_no_score(value: object) -> str | None:
    """Why a judge's reply with this `score` field cannot be used, or None."""
    return None if parse_score(value) is not None else f"no score from 0 to 100: {value!r}"
