"""Scores from 0 to 100 as judges write them: 85, 87.5, "85/100", "٨٥", "٨٧٫٥ %". What is not clearly one is none."""

import math
import re

_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹٫٪", "01234567890123456789.%")
_SCORE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*(?:%|/\s*100|من\s*100|out of 100)?", re.ASCII)

LOWEST, HIGHEST = 0.0, 100.0


def parse_score(value: object) -> float | None:
    """The score that a judge's `score` field holds, or None.

    Only the whole of the field counts, so that a score quoted from the judged text ("the source says 100/100") is no
    score. Outside 0-100, on another scale ("8.5/10"), a truth value, NaN: None. None is never an acceptance.
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
