"""Elements of HTML and SVG: every text and every attribute in them is escaped, so text of others stays text."""

from html import escape

from ilf_trt.errors import shown

TEXT_CHARS = 2000
VOID = frozenset(("meta", "img", "br"))


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Markup


def element(name: str, /, *content: Content, **attributes: Content | float) -> Markup:
    """`element("td", "<b>", class_="title")` -> `<td class="title">&lt;b&gt;</td>`.

    Attributes lose a trailing underscore, others become hyphens. Text keeps at most 2,000 characters and no control
    characters; `Markup` stays as it is.
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*content)}</{name}>")


def joined(*content: Content) -> Markup:
    """Several pieces, one after another."""
    return Markup("".join(_text(piece) for piece in content))


def _text(value: Content | float) -> str:
    if isinstance(value, Markup):
        return value
    return escape(shown(str(value), TEXT_CHARS)) if isinstance(value, str) else f"{value:.6g}"
