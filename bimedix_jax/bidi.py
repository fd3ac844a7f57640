"""Arabic on terminals that print characters from left to right in the order in which they arrive.

Text is kept, saved and by default printed in logical order, which is what terminals with bidirectional support expect
(GNOME Terminal, Konsole, mlterm, Apple's Terminal) and what copying and screen readers need. Others (Windows Terminal,
kitty, Alacritty, xterm, most multiplexers) show it mirrored and with unjoined letters; for them `visual` reorders a
line. A program cannot find out which kind of terminal it writes to, so the user chooses.
"""

import re
from typing import IO

import arabic_reshaper
from bidi.algorithm import get_display

_ARABIC = re.compile(r"[\u0590-\u08ff]")


def is_needed(wanted: bool, stream: IO[str]) -> bool:
    """Whether lines are printed in visual order: the user asked for it, and `stream` is a terminal and not a file."""
    return wanted and stream.isatty()


def visual(line: str) -> str:
    """`line` joined and in visual order (Unicode bidirectional algorithm); unchanged where it has no Arabic.

    Vowel marks are left out, because in visual order a terminal draws them on the wrong letter.
    """
    if not _ARABIC.search(line):
        return line
    return str(get_display(arabic_reshaper.reshape(line)))
