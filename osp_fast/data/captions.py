"""Captions: what the text encoder reads for a clip.

The model was trained on captions cleaned in one exact way, so a prompt or a caption that is cleaned differently gives
it words it has not seen. The steps and their order are upstream's; they are kept as tables of (pattern, replacement),
applied from top to bottom.
"""

import html
import random
import re
import urllib.parse
import warnings

from osp_fast.data.aesthetic import aesthetic_sentences
from osp_fast.data.annotations import Entry

_DROP = ""
_SPACE = " "
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# A bare host with its path. What an @ follows is not a host but the name of a mailbox.
_HOST = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
# Unicode's dash punctuation, wavy and full-width dashes included.
_DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    r"\ufe31\ufe32\ufe58\ufe63\uff0d"
)
# CJK strokes, small katakana, enclosed and compatibility signs, extension A, hexagrams: never part of a caption.
_CJK_SIGNS = r"\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff"
_CJK_IDEOGRAPHS = r"\u4e00-\u9fff"


def _table(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_LINKS = _table(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", _DROP),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_HOST})", _DROP),
)
_CHARACTERS = _table(
    (r"@\w+\b", _DROP),
    (f"[{_CJK_SIGNS}]+", _DROP),
)
_IDEOGRAPHS = _table((f"[{_CJK_IDEOGRAPHS}]+", _DROP))
_PUNCTUATION = _table(
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", _DROP),
    ("&amp", _DROP),
    (r"\d{1,3}(?:\.\d{1,3}){3}", _SPACE),  # IP addresses
    (r"\d:\d\d\s+$", _DROP),
    (r"\\n", _SPACE),  # a newline that was written as two characters
    (r"#\d{1,3}\b", _DROP),
    (r"#\d{5,}\b", _DROP),
    (r"\b\d{6,}\b", _DROP),
    (rf"\S+\.(?:{_FILE_TYPES})", _DROP),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", _SPACE),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", _SPACE),
    (r"\s+\.\s+", _SPACE),
)
_UNPAIRED = re.compile("[\ud800-\udfff]")  # surrogates: JSON can hold them, UTF-8 and the tokenizer cannot
_JOINERS = re.compile("[-_]")
_MAX_JOINERS = 3  # more of them mean that the words of a title were joined
_CODES_AND_BOILERPLATE = _table(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", _DROP),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", _DROP),
    (r"\b\d+[a-zA-Z]+\d+\b", _DROP),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", _DROP),
    (r"(?:free\s)?download(?:\sfree)?", _DROP),
    (r"\bclick\b\s(?:for|on)\s\w+", _DROP),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", _DROP),
    (r"\bpage\s+\d+\b", _DROP),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", _SPACE),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", _DROP),  # sizes; the second letter is Cyrillic
)
_SPACING_AND_EDGES = _table(
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", _SPACE),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", _DROP),
    (r"['_,\-:+]$", _DROP),
    (r"^\.\S+$", _DROP),
)


def _apply(rules: tuple[tuple[re.Pattern, str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _html_text(text: str) -> str:
    """The text of an HTML fragment, tags gone and entities resolved."""
    if "<" not in text and "&" not in text:
        return text  # most captions: no markup, so no parser
    import bs4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        try:
            return bs4.BeautifulSoup(text, features="html.parser").text
        except bs4.ParserRejectedMarkup:
            # The one thing that the parser gives up on is a declaration that it does not know, such as "<![x".
            return bs4.BeautifulSoup(text.replace("<![", _SPACE), features="html.parser").text


def clean_caption(text: str, chinese: bool = True) -> str:
    """The caption in the form that the model was trained on.

    `chinese` keeps CJK ideographs; upstream keeps them when the text encoder is an mT5. The result is lower-case, on
    one line, without links, markup and file names; it may be empty. Never raises for a string.
    """
    import ftfy

    text = _UNPAIRED.sub("\ufffd", urllib.parse.unquote_plus(text)).strip().lower()
    text = _html_text(_apply(_LINKS, text))
    text = _apply(_CHARACTERS, text)
    if not chinese:
        text = _apply(_IDEOGRAPHS, text)
    text = _apply(_PUNCTUATION, text)
    if len(_JOINERS.findall(text)) > _MAX_JOINERS:
        text = _JOINERS.sub(_SPACE, text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_SPACING_AND_EDGES, _apply(_CODES_AND_BOILERPLATE, text)).strip()


def training_caption(entry: Entry, draw: random.Random, drop_probability: float, chinese: bool) -> str:
    """The cleaned caption of one use of a clip; "" with probability `drop_probability` (for guidance without text).

    One of the entry's captions is drawn. If the clip's aesthetic score is low or high, a sentence that says so is put
    before or after it with equal odds. Four numbers are taken from `draw` whatever the entry holds, so that the draws
    that follow do not depend on it.
    """
    which, sentence, side, dropped = (draw.random() for _ in range(4))
    if dropped < drop_probability:
        return ""
    caption = entry.captions[int(which * len(entry.captions))]
    sentences = aesthetic_sentences(entry.aesthetic, entry.is_image)
    if sentences:
        notice = sentences[int(sentence * len(sentences))]
        caption = f"{notice} {caption}" if side < 0.5 else f"{caption} {notice}"
    return clean_caption(caption, chinese)


def is_dropped(draw: random.Random, drop_probability: float) -> bool:
    """Whether `training_caption` drops the caption with this draw."""
    *_, dropped = (draw.random() for _ in range(4))
    return dropped < drop_probability
