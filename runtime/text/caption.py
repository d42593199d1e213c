"""A caption made ready for the tokenizer: lower-cased, or cleaned of what captions from the web carry along."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus

from ilf_trt.errors import InvalidRequest, MissingDependency

PASSES = 2  # a pass can uncover what the next one removes
MOST_JOINTS = 3  # of more dashes and underscores than this, all join the words of a title and become spaces
SHOWN = 60  # characters of a caption in a message

DOMAIN = r"[a-z0-9.\-]+\.(?:com?|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
SCHEME_END = r"(?:/{1,3}|[a-z0-9%])"
MEDIA = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
NUMBER = r"\d+\.?\d*"


@dataclass(frozen=True, slots=True)
class Rule:
    """`what` a caption is rid of: `after` stands wherever `pattern` did."""

    what: str
    pattern: re.Pattern[str]
    after: str


def rule(what: str, pattern: str, after: str = "") -> Rule:
    return Rule(what, re.compile(pattern), after)


# The rules run in this order. Those of MARKUP see text in lower case; HTML entities bring capitals back later.
MARKUP = (
    rule("the mark of a person, which is no tag", "<person>", "person"),
    rule("web addresses, and https: itself", rf"\b(?:https?:{SCHEME_END}|{DOMAIN})"),
    rule("web addresses that the rule above brought together", rf"\b(?:www:{SCHEME_END}|{DOMAIN})"),
)
TEXT = (
    rule("names of accounts", r"@\w+"),
    rule("Chinese characters, their strokes, enclosed and squared forms, hexagrams", "[\u31c0-\u9fff]+"),
    rule(
        "dashes of every script",
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        "\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    rule("double quotation marks of every kind", "[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    rule("single quotation marks of every kind", "[\u2018\u2019]", "'"),
    rule("escaped quotation marks", "&quot;?"),
    rule("escaped ampersands", "&amp"),
    rule("IP addresses", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    rule("the clock time at the end of an article", r"\d:\d\d\s+\Z"),
    rule("line breaks that were written out", r"\\n", " "),
    rule("numbers after #, except of 4 digits", r"#(?:\d{1,3}|\d{5,})\b"),
    rule("long numbers", r"\b\d{6,}\b"),
    rule("names of media files with all that is written onto them", rf"(?<!\S)\S+\.{MEDIA}"),
    rule("repeated quotation marks", "[\"']{2,}", '"'),
    rule("dots of omission", r"\.{2,}", " "),
    rule("ornaments and brackets", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    rule("dots that stand alone", r"\s+\.\s+", " "),
)
JOINTS = rule("dashes and underscores between the words of a title", "[-_]", " ")
REPAIRED = (
    rule("identifiers as jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    rule("identifiers as jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    rule("identifiers as 6640vc231", r"\b\d+[a-zA-Z]+\d+\b"),
    rule("offers to ship", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    rule("offers to download", r"(?:free\s)?download(?:\sfree)?"),
    rule("requests to click", r"\bclick\s(?:for|on)\s\w+"),
    rule("names of media formats", rf"\b{MEDIA}(?:\simages?)?"),
    rule("page numbers", r"\bpage\s+\d+\b"),
    rule("identifiers of letters and digits in turn", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    rule("sizes, with a Latin x, a Cyrillic one or a times sign", rf"\b{NUMBER}[xх×]{NUMBER}\b"),
    rule("the space before a colon", r"\b\s+:\s+", ": "),
    rule("the missing space after a comma, dot or slash", r"(?<=\D[,./])\b", " "),
    rule("repeated space", r"\s+", " "),
)
# Space at an end hides it from these: diffusers strips the caption here, and drops the stripped one.
ENDS = (
    rule("quotation marks around the whole", "\\A[\"'](.+)[\"']\\Z", r"\1"),
    rule("a mark at the beginning", r"\A['_,\-:;]"),
    rule("a mark at the end", r"['_,\-:+]\Z"),
    rule("a single word that begins with a dot", r"\A\.\S+\Z"),
)


def prepared(caption: str, *, clean: bool) -> str:
    """`caption` as PixArt's pipelines of diffusers 0.42 give it to the tokenizer (`_text_preprocessing`).

    Without `clean` it is lower-cased and stripped. With it, it is rid of markup, addresses, file names, identifiers,
    advertisements and Chinese characters; the time grows with the square of the longest stretch without a space.
    Raises MissingDependency when cleaning without beautifulsoup4 or ftfy, and InvalidRequest for a caption that
    cannot be read as HTML.
    """
    if not clean:
        return caption.lower().strip()
    for _ in range(PASSES):
        caption = _cleaned(caption)
    return caption


def _cleaned(caption: str) -> str:
    try:
        import ftfy
        from bs4 import BeautifulSoup
        from bs4.builder import ParserRejectedMarkup
    except ImportError as error:
        raise MissingDependency(f"cleaning captions needs {error.name}; pip install 'ilf-trt[captions]'") from error
    text = _applied(MARKUP, unquote_plus(caption).strip().lower())
    try:
        # An empty element in front adds no text, and keeps bs4 from warning that a caption looks like a file name, an
        # address or XML. Python's filter of warnings would do it too, but it belongs to all threads.
        text = _applied(TEXT, BeautifulSoup(f"<br/>{text}", features="html.parser").text)
        if len(JOINTS.pattern.findall(text)) > MOST_JOINTS:
            text = _applied((JOINTS,), text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    except (ParserRejectedMarkup, ValueError) as error:
        shown = caption[:SHOWN] + "…" * (len(caption) > SHOWN)
        raise InvalidRequest(
            f"caption {shown!r} cannot be read as HTML ({str(error).splitlines()[-1].strip()}); "
            "take its '<!' and '&#' out, or do not clean it"
        ) from error
    return _applied(ENDS, _applied(REPAIRED, text)).strip()


def _applied(rules: Sequence[Rule], text: str) -> str:
    for each in rules:
        text = each.pattern.sub(each.after, text)
    return text
