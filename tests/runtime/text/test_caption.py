"""A caption ready for the tokenizer equals that of diffusers' PixArt pipelines, cleaned and not."""

import random
import sys
import time
import warnings
from contextlib import suppress
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilf_trt.errors import InvalidRequest, MissingDependency
from ilf_trt.runtime.text import caption as captions
from ilf_trt.runtime.text.caption import Substitution, prepare_caption

RECOMBINED = 1000
MOST_PARTS = 12
TABLES = ("MARKUP", "TEXT", "AFTER_REPAIR", "ENDS")

CORPUS = (
    "",
    " ",
    "A small cactus with a happy face in the Sahara desert.",
    "  A Cat,\tASLEEP \n on two lines  ",
    # addresses
    "see https://example.com/a/b-c_d?x=1 now",
    "http://x.org",
    "https:///three and https:x",
    "www.example.com",
    "www:example",
    "example.co.uk/path/ and other.ru",
    "write to someone@example.com or me@example.com.",
    "a photo from shop.example.net/item-12/",
    "not.acompany and dot.comet",
    "photo from a.chttp://om here",
    "percent%20encoded+plus%2Bsign %e2%80%94 %ff",
    # markup and entities
    "<b>bold</b> and <i class='x'>italic</i><br>next<br/>line",
    "a <person> beside another <PERSON>",
    "<script>alert(1)</script>a<style>b</style><template>c</template>",
    "a <!-- comment --> b <!doctype html> c",
    "<?xml version='1.0'?><a>b</a>",
    "2 < 3 > 1 & <unclosed",
    "fish &amp; chips &lt;b&gt; &quot;quoted&quot; &#65;bc &Auml; &nbsp; x",
    "fish &amp;amp; chips &amp;quot; and &amp;quot &amp;amp;amp;",
    "&amp;lt;em&amp;gt;twice&amp;lt;/em&amp;gt; &#0; &#x110000;",
    # accounts, numbers, identifiers
    "by @nick_name and @Ник9, mail@",
    "#1 #123 #1234 #12345 #123456 123456 12345 1234567890",
    "the host 127.0.0.1 or 192.168.100.200:80",
    "news at 1:23 ",
    "news at <b>1:23 </b>",
    "at 12:30 sharp",
    "jc6640 abc123 abcd123 a12 jc6640vc 6640vc231 j2d1a2a 1a2b3c4d",
    "IMG_2034.JPG a photo.jpeg.png rest",
    "report.pdf holiday.mp4 .png a.bmp/b.webp app.apk x.eps",
    "what\\nis\\nthis",
    # advertisements
    "free shipping and worldwide free shipping, Worldwide  shipping",
    "free download free, download now, free downloads",
    "click here, click for more, click on this, clicks on it",
    "jpg png images, jpeg image, pngs, ajpg",
    "page 1/3, page 12, pages 3, homepage 4",
    "1920x1080 wallpaper, 5.5х6 cm, 3×4, 2x, x2, 10.x20.",
    # scripts
    "\u4e00\u4e8c a \u31c0\u31ef \u31f0\u31ff \u3200\u32ff \u3300\u33ff \u3400\u4dbf \u4dc0\u4dff \u9fff b",
    "\u31bf outside \ua000 \U00020000 of the ranges \u3042\u30a2 \ud55c",
    "Кошка на окне, «Москва», 5 х 6",
    "قطة نائمة، ١٢٣ ١٢٣٤٥٦",
    "🐈 a cat 👩\u200d🚀 and a café, naïve, İstanbul, straße, ﬁre, ｆｕｌｌ　width",
    "mojibake: cafÃ© donâ€™t ã€’",
    # dashes and quotes
    "a-b \u058a \u05be \u1400 \u1806 \u2010\u2011\u2012\u2013\u2014\u2015 \u2e17 \u2e1a \u2e3a \u2e3b \u2e40",
    "a \u301c \u3030 \u30a0 \ufe31 \ufe32 \ufe58 \ufe63 \uff0d b -- c",
    "`a´ «b» \u201cc\u201d ¨d ‘e’ \"f\" 'g'",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat",
    "only-three-joints-here and one-two",
    # punctuation
    '"""AUSVERKAUFT""" ***AUSVERKAUFT*** #AUSVERKAUFT',
    "wait... what.. no . yes .. end",
    "®•©™&@·º½¾¿¡§~ (a) [b] {c} d|e\\f/g*h",
    "title : the rest :end",
    "a,b.c/d 1,5 1.5 e,.f ,.",
    "ends with.,",
    "ends with:",
    "ends with +",
    "ends with-",
    ", begins",
    "_begins",
    ":begins;",
    ".hidden",
    ".hidden word",
    "\"a whole in quotes\"",
    "'a whole in quotes'",
    "'' ''",
    "\"",
    "\u00a0\u2003a\u200bb\u0085c\u2028d\x00",
    "very long " * 400,
    "long-" * 400,
)  # fmt: skip


def recombined() -> list[str]:
    rng = random.Random(0)
    pieces = [piece for text in CORPUS[:-2] for piece in (text, *text.split())]
    return [
        "".join(rng.choice(pieces) + rng.choice(("", "", " ", ".", "'")) for _ in range(rng.randint(1, MOST_PARTS)))
        for _ in range(RECOMBINED)
    ]


@pytest.fixture(scope="module")
def pipeline() -> object:
    """A PixArt pipeline without models."""
    for package in ("transformers", "bs4", "ftfy"):
        pytest.importorskip(package, reason=f"diffusers cleans captions only where {package} is installed")
    from diffusers import PixArtSigmaPipeline

    return object.__new__(PixArtSigmaPipeline)


def reference(pipeline: object, text: str, *, clean: bool) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bs4 takes some captions for file names, addresses or XML
        [done] = pipeline._text_preprocessing(text, clean_caption=clean)  # type: ignore[attr-defined]
    return done


@pytest.mark.parametrize("text", CORPUS, ids=lambda text: ascii(text[:40]))
@pytest.mark.parametrize("clean", [False, True], ids=["as it is", "clean"])
def test_a_caption_equals_that_of_diffusers(text: str, clean: bool, pipeline: object) -> None:
    assert prepare_caption(text, clean=clean) == reference(pipeline, text, clean=clean)


def test_parts_of_captions_put_together_again_equal_those_of_diffusers(pipeline: object) -> None:
    for text in recombined():
        assert prepare_caption(text, clean=True) == reference(pipeline, text, clean=True), ascii(text)


def test_the_two_pipelines_of_pixart_clean_alike(pipeline: object) -> None:
    from diffusers import PixArtAlphaPipeline

    alpha = object.__new__(PixArtAlphaPipeline)
    for text in CORPUS:
        assert reference(alpha, text, clean=True) == reference(pipeline, text, clean=True), ascii(text)


@pytest.mark.parametrize(
    ("table", "dropped"),
    [(table, dropped) for table in TABLES for dropped in getattr(captions, table)],
    ids=lambda value: value.what if isinstance(value, Substitution) else value,
)
def test_without_any_one_substitution_a_caption_differs(
    table: str, dropped: Substitution, pipeline: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [prepare_caption(text, clean=True) for text in CORPUS]
    monkeypatch.setattr(captions, table, tuple(each for each in getattr(captions, table) if each is not dropped))
    assert [prepare_caption(text, clean=True) for text in CORPUS] != wanted


@pytest.mark.parametrize(
    "text",
    ["<![x[ a cat", f"&#{'1' * 5000};", f"\uff06\uff03{'1' * 5000}a"],
    ids=["marked section", "too long a number", "too long a number in wide characters"],
)
def test_a_caption_that_is_no_html_is_refused(text: str, pipeline: object) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be parsed as HTML .*do not clean it"):
        prepare_caption(text, clean=True)


@pytest.mark.parametrize("package", ["bs4", "ftfy"])
def test_cleaning_without_a_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", ModuleType("ftfy"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"needs {package}; pip install 'ilf-trt\[text\]'"):
        prepare_caption("a cat", clean=True)


def test_not_cleaning_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("bs4", "ftfy"):
        monkeypatch.setitem(sys.modules, package, None)
    assert prepare_caption("  A Cat&amp;Dog ", clean=False) == "a cat&amp;dog"


# --- hostile captions

HOSTILE_CHARS = 10_000
HOSTILE_S = 0.5
FRAGMENTS = (
    *("<", "<a", "<a ", "<a b='", "</", "<!--", "<!", "<?", "<a>", "</a>", "<script>", "<person>", ">", "-->"),
    *("http://", "https:", "www.", "www:", "a.com", "a.", "-.", "@", "@a", "/", "%", "%2", "%252525", "+"),
    *("&", "&#", "&#1", "&#x", "&amp;", "&amp", "&quot", "&lt;", "＆＃"),
    *("1", "1.", "#1", "1.1.1.", "1x", "1x1", "1:", "1:23 ", "a1", "1a", "a1a"),
    *("_", "-", "a_", "\u2014", "'", '"', "`", "\\n", "\\", "(", "*", " ", "\t", "\n", " . ", " : ", ":", ",", "a,"),
    *(".jpg", "a.jp", ".", "free ", "free shipping ", "worldwide  ", "download ", "click on ", "page ", "png "),
    *("é", "Ã©", "â€™", "猫", "İ", "ß", "ﬁ", "\u200b", "\u0301", "🐈", "\x00", "\x85", "\u2028", "\u0640"),
)  # fmt: skip


@pytest.fixture(scope="module")
def _warm() -> None:
    """The packages that clean captions are loaded, so that no time is theirs."""
    for package in ("bs4", "ftfy"):
        pytest.importorskip(package)
    prepare_caption("a caption", clean=True)


def assert_soon(text: str) -> None:
    """A caption is cleaned or refused within HOSTILE_S of this thread's own time."""
    begin = time.thread_time()
    with suppress(InvalidRequest):
        prepare_caption(text, clean=True)
    assert time.thread_time() - begin < HOSTILE_S


@pytest.mark.parametrize("begin", ["", "<a ", "'", "<script>"])
@pytest.mark.parametrize("fragment", FRAGMENTS, ids=ascii)
@pytest.mark.usefixtures("_warm")
def test_a_caption_of_one_thing_again_and_again_takes_no_time(fragment: str, begin: str) -> None:
    assert_soon(f"{begin}{fragment * HOSTILE_CHARS}"[:HOSTILE_CHARS])


@pytest.mark.fuzz
@pytest.mark.usefixtures("_warm")
@given(
    runs=st.lists(
        st.tuples(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4), st.integers(1, HOSTILE_CHARS)),
        min_size=1,
        max_size=4,
    ),
    again=st.integers(1, 100),
)
def test_any_caption_is_cleaned_or_refused_soon(runs: list[tuple[list[str], int]], again: int) -> None:
    text = "".join("".join(parts) * count for parts, count in runs) * again
    assert_soon(text[:HOSTILE_CHARS])


@pytest.mark.parametrize("tags", [captions.MOST_OPEN_TAGS, captions.MOST_OPEN_TAGS + 1])
@pytest.mark.usefixtures("_warm")
def test_a_caption_may_leave_so_many_tags_open_and_no_more(tags: int) -> None:
    text = f"a cat {'<b ' * tags}"
    if tags <= captions.MOST_OPEN_TAGS:
        assert prepare_caption(text, clean=True).startswith("a cat")
        return
    with pytest.raises(InvalidRequest, match=rf"begins {tags} tags that it does not end, at most") as told:
        prepare_caption(text, clean=True)
    assert str(told.value).isprintable()


@pytest.mark.fuzz
@pytest.mark.usefixtures("_warm")
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_cleaned_or_refused(text: str) -> None:
    with suppress(InvalidRequest):
        prepare_caption(text, clean=True)
