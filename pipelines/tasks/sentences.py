"""Where the sentences of a text begin and end, by rules; for English, and texts punctuated like it.

A blank line always ends one, a list item and a heading stand alone, and a full stop ends one unless
it belongs to an abbreviation, an initial, a number or an address.
"""

import re
from collections.abc import Iterator

# What a full stop often follows without an end.
# fmt: off
_ABBREVIATIONS = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "messrs", "mme", "rev", "hon", "gen", "col",
    "lt", "sgt", "capt", "gov", "sen", "rep", "pres", "vs", "etc", "cf", "al", "eg", "ie", "e.g",
    "i.e", "viz", "approx", "ca", "resp", "no", "nos", "vol", "vols", "pp", "p", "fig", "figs",
    "eq", "eqs", "sec", "secs", "ch", "ed", "eds", "art", "arts", "para", "inc", "ltd", "co",
    "corp", "llc", "bros", "dept", "univ", "assn", "u.s", "u.k", "u.n", "a.m", "p.m", "b.c", "a.d",
    "ph.d", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
    "mon", "tue", "tues", "wed", "thu", "thur", "thurs", "fri", "sat", "sun", "ave", "blvd", "rd",
    "mt", "ft",
})
# fmt: on
# Of these some end a sentence as often as not: what follows decides, by its capital letter.
_MAY_END = frozenset({"etc", "inc", "ltd", "co", "corp", "u.s", "u.k", "u.n", "a.m", "p.m", "ph.d"})
_CLOSERS = "\"'”’)\\]»›"  # noqa: RUF001
_BOUNDARY = re.compile(
    rf"(?P<stop>[.!?…]+)[{_CLOSERS}]*(?=\s|$)"  # Latin punctuation, before a space
    r"|(?P<wide>[。！？]+)[”’」』）]*"  # of East Asian scripts, before anything  # noqa: RUF001
    r"|(?P<blank>[ \t]*\n[ \t]*(?:\n\s*)+)"  # an empty line
    r"|(?P<item>[ \t]*\n(?=[ \t]*(?:[-*+•·–] |\(?\d{1,3}[.)] |#{1,6} |[=~^-]{3,}\s*\n)))"  # noqa: RUF001
)
_WORD_BEFORE = re.compile(r"[\w.]+$")
# What prose has between these many words, and what it has none of: code, rules, tables, directives.
_MIN_WORDS, _MAX_WORDS = 5, 60
_MARKUP = re.compile(
    r"^\s*(?:\.\. |>>>|\$ |#|\||@|```|~~~|(?:def|class|import|from \w+ import) )"
    r"|[-=~^+*_#]{4,}|\n\s*(?:>>>|\|)|[{};]\s*\n"
)
_AROUND_WORDS = "\"'“”‘’`()[].,;:!?…*_"  # noqa: RUF001
_STARTS_LOW = re.compile(r"\s*[a-zà-öø-ÿ,;:)]")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return (begin, end) of every sentence, in characters, end exclusive, without blanks around.

    Example:
        >>> sentence_spans("Dr. Who left. He ran.")
        [(0, 13), (14, 21)]
    """
    return list(_spans(text))


def is_prose(sentence: str) -> bool:
    """Tell whether a sentence reads as one: no heading, code, table row, link or list of numbers.

    Example:
        >>> is_prose("A sentence has a verb, and ends."), is_prose("x = f(a, b)  # no words")
        (True, False)
    """
    words = sentence.split()
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS or _MARKUP.search(sentence):
        return False
    if not re.search(rf"[.!?…:][{_CLOSERS}*_`]*$|[。！？]", sentence):  # noqa: RUF001
        return False
    letters = sum(c.isalpha() for c in sentence)
    plain = sum(word.strip(_AROUND_WORDS).replace("-", "").isalpha() for word in words)
    return letters >= 0.7 * sum(map(len, words)) and plain >= 0.6 * len(words)


def _spans(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    for found in _BOUNDARY.finditer(text):
        if found["stop"] and not _ends(text, begin, found):
            continue
        yield from _trimmed(text, begin, found.end())
        begin = found.end()
    yield from _trimmed(text, begin, len(text))


def _ends(text: str, begin: int, found: re.Match[str]) -> bool:
    """Tell whether a full stop, or what stands like one, ends a sentence."""
    if _STARTS_LOW.match(text, found.end()):
        return False
    if found["stop"] != ".":
        return True
    before = _WORD_BEFORE.search(text, begin, found.start())
    word = before[0].strip(".").lower() if before else ""
    if word in _MAY_END:
        return True
    is_initial = len(word) == 1 and word.isalpha() and text[found.start() - 1].isupper()
    # A number before a full stop at the beginning of a line counts an item.
    is_item = word.isdigit() and not text[begin : found.start() - len(word)].strip()
    return not (word in _ABBREVIATIONS or is_initial or is_item)


def _trimmed(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    piece = text[begin:end]
    stripped = piece.strip()
    if stripped:
        start = begin + len(piece) - len(piece.lstrip())
        yield start, start + len(stripped)
