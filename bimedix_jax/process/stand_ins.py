"""What a file is by its first bytes: its content, or a stand-in such as a git-lfs pointer or a web page."""

PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error>")
ANSWERS = (b"entry not found", b"404: not found", b"not found", b"invalid username or password", b"access denied")
"""Answers of servers that were saved as if they were the file, in lower case."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""


def stand_in(head: bytes, text: bool = False, markup: bool = False) -> str | None:
    """Describes a file that is only a stand-in, judging by its first bytes, with the remedy; None if it may be
    genuine."""
    wide = head.startswith(WIDE_MARKS)
    start = head.decode("utf-16", "ignore").encode() if wide else head.removeprefix(BYTE_ORDER_MARK)
    start = start.strip().lower()
    if start.startswith((b"version https://git-lfs.github.com/", b"version https://hawser.github.com/")):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull` in its clone, or download the file"
    if start.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "is a git-annex pointer, not the file itself; run `git annex get` in its clone, or download the file"
    if not markup and start.startswith(PAGES):
        return (
            "is a web page (HTML or XML), not the file itself; the download was redirected or refused, so check the "
            "address and your login, and download the file again"
        )
    if start.rstrip(b".") in ANSWERS:
        return (
            f"contains only a server's answer, {start.decode('utf-8', 'replace')!r}, not the file itself; check the "
            "address and your login, and download the file again"
        )
    if text and head and not head.strip(b"\0"):
        return "contains zero bytes only, as after a loss of power; restore it from a copy, or write it again"
    if text and (wide or b"\0" in head):
        if wide or _is_wide(head):
            return "is UTF-16 or UTF-32 text; save it as UTF-8"
        return "contains zero bytes, so it is not text; name a text file"
    return None


def _is_wide(head: bytes) -> bool:
    """Whether bytes without a byte order mark are UTF-16 or UTF-32: as such, most are Latin, Arabic, ... letters."""
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        letters = head.decode(encoding, "replace")
        if 2 * sum(ord(x) < 0x800 and (x.isprintable() or x.isspace()) for x in letters) > len(letters):
            return True
    return False
