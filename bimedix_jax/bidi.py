"""Arabic on terminals that print characters from left to right in the order in which they arrive.

Text is kept, saved and by default printed in logical order, which is what terminals with bidirectional support expect
(GNOME Terminal, Konsole, mlterm, Apple's Terminal) and what copying and screen readers need. Others (Windows Terminal,
kitty, Alacritty, xterm, most multiplexers) show it mirrored and with unjoined letters; for them `visual` reorders a
line. A program cannot ask a terminal which kind it is; `reorders_nothing` knows some by their environment variables,
and the user can choose.
"""

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import IO

_ARABIC = re.compile(r"[\u0590-\u08ff]")


def is_needed(wanted: bool, stream: IO[str]) -> bool:
    """Whether lines are printed in visual order: user or terminal asked for it, and `stream` is a terminal, no file."""
    return wanted and stream.isatty()


# terminals and multiplexers that print characters in the order in which they arrive
_VARIABLES = ("WT_SESSION", "KITTY_WINDOW_ID", "ALACRITTY_WINDOW_ID", "XTERM_VERSION", "TMUX", "STY")
_TERMS = ("xterm-kitty", "alacritty", "linux", "tmux", "screen")


def reorders_nothing(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the terminal is known to have no bidirectional text; BIMEDIX_BIDI=1 or 0 decides for an unknown one."""
    found = os.environ if environment is None else environment
    if (chosen := found.get("BIMEDIX_BIDI", "")) in ("0", "1"):
        return chosen == "1"
    return any(found.get(name) for name in _VARIABLES) or found.get("TERM", "").startswith(_TERMS)


def is_right_to_left(line: str) -> bool:
    """Whether the first letter with a direction is Arabic or Hebrew (Unicode bidirectional algorithm, P2)."""
    kinds = (unicodedata.bidirectional(letter) for letter in line)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def visual(line: str, right_to_left: bool | None = None) -> str:
    """`line` joined and in visual order (Unicode bidirectional algorithm); unchanged where it has no Arabic.

    `right_to_left` is the direction of the paragraph that the line is a part of; by default that of its first letter.

    Vowel marks are left out, because in visual order a terminal draws them on the wrong letter.
    """
    if not _ARABIC.search(line):
        return line
    import arabic_reshaper  # imports fontTools, if it is installed
    from bidi.algorithm import get_display

    direction = None if right_to_left is None else "R" if right_to_left else "L"
    return str(get_display(arabic_reshaper.reshape(line), base_dir=direction))
