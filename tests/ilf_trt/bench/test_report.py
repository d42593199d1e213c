"""The reports of a benchmark: a page, and Markdown for a pull request."""

import re
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ilf_trt.bench.drawing import Scale
from ilf_trt.bench.markup import element
from ilf_trt.bench.observation import Observation
from ilf_trt.bench.report_html import report_html
from ilf_trt.bench.report_md import report_md
from ilf_trt.bench.result import Result
from ilf_trt.bench.statistics import Spread
from tests.ilf_trt.bench.pages import Page
from tests.ilf_trt.bench.synthetic import TURNS, WORK, failed, observations, result, with_row
from tests.ilf_trt.bench.test_terminal_view import named

PNG = b"\x89PNG\r\n\x1a\n"
SCRIPT = '</style></title><script>alert(1)</script><img src="http://a.b/c" onerror=x>'
ENVIRONMENT = {"machine": {"cpu": "AMD", "gpu": None}, "versions": ["a", "b"]}
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def page_of(whole: Result, **how: object) -> Page:
    return Page.of(report_html(whole, observations(), ENVIRONMENT, {"ilf": PNG, "equal": PNG}, **how))  # type: ignore[arg-type]


def names(page: Page) -> list[str]:
    return [each.name for each in page.elements]


def test_the_page_loads_nothing_and_forbids_the_browser_to() -> None:
    page = page_of(result(1, 4))
    assert page.loaded == ["data:image/png;base64,iVBORw0KGgo="] * 2
    (policy,) = (each for each in page.root.all("meta") if each.attributes.get("http-equiv"))
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    (style,) = page.root.all("style")
    assert not re.search(r"url\(|@import|//", style.text)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(names(page))


def test_the_page_has_a_row_for_each_that_was_measured() -> None:
    whole = failed(result(1, 4), "compile", "g++ was not found")
    page = page_of(whole)
    rows = [each.words() for each in page.root.all("tr")]
    for each in whole.rows:
        assert any(each.title in text and each.library in text for text in rows)
    assert sum("failed: g++ was not found" in text for text in rows) == 2


def test_every_run_is_a_dot_of_its_row() -> None:
    dots = [each for each in page_of(result()).root.all("circle") if "dot" in each.attributes["class"]]
    assert len(dots) == TURNS * len(WORK)
    assert all(0 <= float(each.attributes["cx"].rstrip("%")) <= 100 for each in dots)


def test_a_row_of_many_runs_is_thinned() -> None:
    page = Page.of(report_html(result(), observations(turns=3000, slugs=("ilf",))))
    assert len([each for each in page.root.all("circle") if "dot" in each.attributes["class"]]) == 200


def test_the_bars_of_the_parts_are_as_long_as_their_shares() -> None:
    whole = replace(result(), ilf_ms={"pre": 25.0, "loop_body": 75.0})
    (parts,) = (each for each in page_of(whole).root.all("div") if each.attributes.get("class") == "parts")
    widths = [each.attributes["width"] for each in parts.all("rect") if "fill" in each.attributes["class"]]
    assert widths == ["25.00%", "75.00%"]


def test_points_stand_where_time_and_agreement_put_them() -> None:
    marks = [each for each in page_of(result()).root.all("circle") if "mark" in each.attributes["class"]]
    at = {
        each.attributes["class"]: (float(each.attributes["cx"].rstrip("%")), float(each.attributes["cy"]))
        for each in marks
    }
    assert at["mark ilf"][1] < at["mark equal"][1]  # ILF agrees better, and the screen's y points down
    assert at["mark base"][0] > at["mark ilf"][0]


def test_an_empty_result_is_a_page_too() -> None:
    nothing = replace(result(), rows=(), ilf_ms={})
    page = Page.of(report_html(nothing))
    assert "Pictures" not in page.root.words()
    assert "emoji.ilf" in page.root.words()
    assert "emoji.ilf" in report_md(nothing, {})


@settings(max_examples=25)
@given(
    st.one_of(
        st.text(max_size=60), st.text(alphabet="<>&\"'/=a !-[]()`|\\\n\u2028\ud800", max_size=40), st.just(SCRIPT)
    )
)
def test_no_text_of_others_becomes_an_element_or_an_attribute(name: str) -> None:
    plain, hostile = (failed(named(result(1), text), "compile", text) for text in ("x", name or "y"))
    pages = []
    for whole, text in ((plain, "x"), (hostile, name or "y")):
        pictures = {text: PNG, "ilf": PNG}
        pages.append(Page.of(report_html(whole, observations(), {text: {text: [text]}}, pictures)))
    first, second = pages
    assert names(first) == names(second)
    assert [set(each.attributes) for each in first.elements] == [set(each.attributes) for each in second.elements]
    assert first.loaded == second.loaded
    report_html(hostile, observations(), {name: name}, {name: PNG}).encode()


def test_a_script_in_a_name_is_shown_as_text() -> None:
    whole = named(result(), SCRIPT)
    text = report_html(whole, observations(), {SCRIPT: SCRIPT}, {SCRIPT: PNG})
    assert "<script" not in text
    assert "<img src=&" not in text
    assert Page.of(text).root.all("h1")[0].text == SCRIPT


@settings(max_examples=25)
@example(0.0, 1e239, 1e-70)
@example(0.0, 0.0, 0.0)
@given(FINITE, FINITE, FINITE)
def test_no_number_breaks_the_page(first: float, second: float, third: float) -> None:
    spread = Spread(first, second, third, first, second, 3)
    whole = with_row(result(), "plain", host=spread, pictures_per_s=third, peak_mib=second)
    whole = replace(whole, ilf_ms={"pre": first, "post": second})
    runs = [Observation("plain", 1, turn, 0.0, ms) for turn, ms in enumerate((first, second, third))]
    text = report_html(whole, runs)
    Page.of(text)
    assert "nan" not in text.replace("nano", "")
    report_md(whole, {})


@given(FINITE, FINITE, FINITE)
def test_a_scale_has_few_ticks_and_keeps_values_inside(low: float, high: float, value: float) -> None:
    scale = Scale(low, high)
    assert 0 <= scale.percent(value) <= 100
    assert 1 <= len(scale.ticks()) <= 12


def test_ticks_are_round() -> None:
    assert Scale(0, 4939).ticks() == [0, 1000, 2000, 3000, 4000]
    assert Scale(-0.05, 0.05).ticks() == [-0.04, -0.02, 0, 0.02, 0.04]
    assert Scale(24.3, 31.9).ticks() == [26, 28, 30]


def test_an_element_escapes_texts_and_attributes() -> None:
    made = element("td", "<b>&", class_='"x"', data_label=1.5)
    assert made == '<td class="&quot;x&quot;" data-label="1.5">&lt;b&gt;&amp;</td>'


def test_markdown_holds_every_row_the_verdict_and_the_command() -> None:
    whole = failed(result(1, 4), "compile", "g++ was not found")
    text = report_md(whole, ENVIRONMENT)
    for each in whole.rows:
        assert f"| {each.title} |" in text.replace("**", "")
    assert "**Verdict:** comparable" in text
    assert "torch.compile, 20 steps, batch 4: failed: g++ was not found" in text
    assert f"```\n{whole.command}\n```" in text
    assert "| machine.cpu | AMD |" in text
    assert "| versions | a, b |" in text


def test_the_tables_of_markdown_keep_their_columns() -> None:
    text = report_md(named(result(), "a|b`c|`"), {"a|b": "c|d"})
    counts: list[set[int]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            counts = counts if inside else [*counts, set()]
            counts[-1].add(len(re.findall(r"(?<!\\)\|", line)))
        inside = line.startswith("|")
    assert len(counts) == 4
    assert all(len(each) == 1 for each in counts)


@given(st.text(max_size=80))
def test_no_text_of_others_becomes_markup_in_markdown(name: str) -> None:
    hostile = f"{name}<script>[a](http://b)@c|`d`"
    text = report_md(named(result(), hostile), {hostile: hostile})
    body = re.sub(r"^(`{3,})$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in body.replace("<details><summary>Environment</summary>", "").replace("</details>", "")
    assert "](" not in body.replace("\\]", "")
    assert "@c" not in body
    assert "://" not in body


def test_a_fence_is_longer_than_any_in_the_command() -> None:
    assert "\n`````\na ````\n`````\n" in report_md(replace(result(), command="a ````"), {})
