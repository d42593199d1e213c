"""Prepares a caption for the tokenizer: lowers its case, or removes the debris of web captions."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import unquote_plus

from ilf_trt.errors import InvalidRequest, MissingDependency, one_line, shown

PASSES = 2  # the first pass can uncover text that the second one removes
MOST_JOINTS = 3  # in a caption with more dashes and underscores, all of them join words and become spaces
MOST_OPEN_TAGS = 64  # Python's parser reads a caption to its end for each tag that has no end
EXCERPT_CHARS = 60  # of a caption in a message

LETTER = r"[a-z0-9.\-]"
DOMAIN = rf"{LETTER}+\.(?:com?|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
SCHEME_END = r":(?:/{1,3}|[a-z0-9%])"
MEDIA = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
NUMBER = r"\d+(?:\.\d*)?"


OPEN_TAG = re.compile("<[a-z!?/]")


@dataclass(frozen=True, slots=True)
class Substitution:
    """Removes `what` from a caption: `replacement` takes the place of every match of `pattern`."""

    what: str
    pattern: re.Pattern[str]
    replacement: str


def substitution(what: str, pattern: str, replacement: str = "") -> Substitution:
    return Substitution(what, re.compile(pattern), replacement)


def addresses(scheme: str) -> str:
    """Web addresses, or else the `kept` rest of a stretch of letters without one.

    A stretch without an address from its first word on has none from a later word on either. Without `kept`, the
    search would read the stretch again from each of its words.
    """
    begin = rf"{scheme}{SCHEME_END}"
    return rf"\b(?:{begin}|{DOMAIN}|(?P<kept>{LETTER}+?(?=\b{begin}|(?!{LETTER}))))"


# The substitutions run in this order. Those of MARKUP see lower case; HTML entities bring capitals back later.
MARKUP = (
    substitution("the mark of a person, which is no tag", "<person>", "person"),
    substitution("web addresses, and https: itself", addresses("https?"), r"\g<kept>"),
    substitution("web addresses that the substitution above brought together", addresses("www"), r"\g<kept>"),
)
TEXT = (
    substitution("names of accounts", r"@\w+"),
    substitution("Chinese characters, their strokes, enclosed and squared forms, hexagrams", "[\u31c0-\u9fff]+"),
    substitution(
        "dashes of every script",
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        "\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    substitution("double quotation marks of every kind", "[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    substitution("single quotation marks of every kind", "[\u2018\u2019]", "'"),
    substitution("escaped quotation marks", "&quot;?"),
    substitution("escaped ampersands", "&amp"),
    substitution("IP addresses", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    substitution("the clock time at the end of an article", r"\d:\d\d\s+\Z"),
    substitution("line breaks that were written out", r"\\n", " "),
    substitution("numbers after #, except of 4 digits", r"#(?:\d{1,3}|\d{5,})\b"),
    substitution("long numbers", r"\b\d{6,}\b"),
    substitution("names of media files with all that is written onto them", rf"(?<!\S)\S+\.{MEDIA}"),
    substitution("repeated quotation marks", "[\"']{2,}", '"'),
    substitution("dots of omission", r"\.{2,}", " "),
    substitution("ornaments and brackets", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    substitution("dots that stand alone", r"(?<!\s)\s+\.\s+", " "),
)
JOINTS = substitution("dashes and underscores between the words of a title", "[-_]", " ")
AFTER_REPAIR = (
    substitution("identifiers as jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    substitution("identifiers as jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    substitution("identifiers as 6640vc231", r"\b\d+[a-zA-Z]+\d+\b"),
    substitution("offers to ship", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    substitution("offers to download", r"(?:free\s)?download(?:\sfree)?"),
    substitution("requests to click", r"\bclick\s(?:for|on)\s\w+"),
    substitution("names of media formats", rf"\b{MEDIA}(?:\simages?)?"),
    substitution("page numbers", r"\bpage\s+\d+\b"),
    substitution("identifiers of letters and digits in turn", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    substitution("sizes, with a Latin x, a Cyrillic one or a times sign", rf"\b{NUMBER}[xх×]{NUMBER}\b"),
    substitution("the space before a colon", r"\b\s+:\s+", ": "),
    substitution("the missing space after a comma, dot or slash", r"(?<=\D[,./])\b", " "),
    substitution("repeated space", r"\s+", " "),
)
# These see the spaces at the ends of a caption: diffusers strips it here, but drops the result.
ENDS = (
    substitution("quotation marks around the whole", "\\A[\"'](.+)[\"']\\Z", r"\1"),
    substitution("a mark at the beginning", r"\A['_,\-:;]"),
    substitution("a mark at the end", r"['_,\-:+]\Z"),
    substitution("a single word that begins with a dot", r"\A\.\S+\Z"),
)


def prepare_caption(caption: str, *, clean: bool) -> str:
    """The text that PixArt's pipelines of diffusers 0.42 pass to the tokenizer (`_text_preprocessing`).

    Without `clean`, the function only lowers the case and strips spaces. With `clean`, it also removes markup,
    addresses, file names, identifiers, advertisements and Chinese characters; its time grows with the length, about
    10 us a character at worst. Raises MissingDependency for `clean` without beautifulsoup4 or ftfy, and InvalidRequest
    if the caption cannot be parsed as HTML, or begins more than MOST_OPEN_TAGS tags that it does not end.
    """
    if not clean:
        return caption.lower().strip()
    for _ in range(PASSES):
        caption = _clean(caption)
    return caption


def check_cleaning() -> None:
    """Raise MissingDependency without the packages that cleaning needs; loads neither."""
    for name in ("bs4", "ftfy"):
        if find_spec(name) is None:
            raise _missing(name)


def _missing(name: str | None) -> MissingDependency:
    return MissingDependency(
        f"cleaning captions needs {name}; pip install 'ilf-trt[text]', or build with --no-clean-captions"
    )


def _clean(caption: str) -> str:
    try:
        import ftfy
        from bs4 import BeautifulSoup
        from bs4.builder import ParserRejectedMarkup
    except ImportError as error:
        raise _missing(error.name) from error
    text = _apply(MARKUP, unquote_plus(caption).strip().lower())
    open_tags = len(OPEN_TAG.findall(text, text.rfind(">") + 1))
    if open_tags > MOST_OPEN_TAGS:
        raise InvalidRequest(
            f"caption {shown(caption, EXCERPT_CHARS)!r} begins {open_tags} tags that it does not end, at most "
            f"{MOST_OPEN_TAGS} are read; remove '<' from it, or do not clean it"
        )
    try:
        # An empty element in front adds no text. It stops bs4 from warning that the caption looks like a file name, an
        # address or XML. Python's warning filter could do the same, but all threads share that filter.
        text = _apply(TEXT, BeautifulSoup(f"<br/>{text}", features="html.parser").text)
        if len(JOINTS.pattern.findall(text)) > MOST_JOINTS:
            text = _apply((JOINTS,), text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    except (ParserRejectedMarkup, ValueError) as error:
        last_line = (str(error).splitlines() or [""])[-1]
        raise InvalidRequest(
            f"caption {shown(caption, EXCERPT_CHARS)!r} cannot be parsed as HTML ({one_line(last_line)}); "
            "remove '<!' and '&#' from it, or do not clean it"
        ) from error
    return _apply(ENDS, _apply(AFTER_REPAIR, text)).strip()


def _apply(substitutions: Sequence[Substitution], text: str) -> str:
    for each in substitutions:
        text = each.pattern.sub(each.replacement, text)
    return text
