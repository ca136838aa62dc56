"""Small pieces of HTML for the report. Every text that comes in is escaped here, once."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from aqdetr_jax.data.images import read_image
from aqdetr_jax.viz.png import png_bytes

MISSING = "–"
_JPEG_ABOVE = 1_500_000


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """Escapes any value for element text and quoted attributes; ``Markup`` passes unchanged."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[Any]) -> Markup:
    """Concatenates, escaping what is not ``Markup``."""
    return Markup("".join(escape(part) for part in parts))


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """Builds an element; ``class_`` stands for class, attributes that are None are left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def table(
    columns: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[Any]],
    *,
    best: Iterable[tuple[int, int]] = (),
    groups: Sequence[tuple[str, int]] = (),
) -> Markup:
    """Builds a scrollable table.

    Args:
      columns: (heading, class) each; the class is "" for numbers, "text", "text wrap", "text code".
      rows: cells in column order.
      best: (row, column) positions to emphasise.
      groups: (heading, number of columns) of a row above the headings.

    Returns:
      The table.
    """
    best = set(best)
    above = [element("th", name, colspan=span, class_="group") for name, span in groups]
    heading = [element("tr", *above)] if above else []
    head = join(element("th", name, class_=kind.split()[0] if kind else None, scope="col")
                for name, kind in columns)  # fmt: skip
    body = []
    for r, row in enumerate(rows):
        cells = []
        for c, (value, (_, kind)) in enumerate(zip(row, columns, strict=True)):
            classes = f"{kind} best".strip() if (r, c) in best else kind
            cells.append(element("td", value, class_=classes or None))
        body.append(element("tr", *cells))
    whole = element(
        "table", element("thead", *heading, element("tr", head)), element("tbody", *body)
    )
    return element("div", whole, class_="scroll", tabindex="0")


def definitions(pairs: Mapping[str, Any]) -> Markup:
    """Builds a list of names and values."""
    return element(
        "dl",
        *(join([element("dt", name), element("dd", text(value))]) for name, value in pairs.items()),
    )


def chart(light: Figure, dark: Figure, *, alt: str, caption: str = "") -> Markup:
    """Embeds a chart in two colourings; the reader's setting chooses, print is always light."""
    dark_source = Markup(
        '<source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{_uri(_png(dark), "png")}">'
    )
    # Twelve-point text of the figure is then about as large as the page's.
    width = round(light.get_figwidth() * 99)
    image = Markup(f'<img src="{_uri(_png(light), "png")}" alt="{escape(alt)}" width="{width}">')
    children = [element("picture", dark_source, image)]
    if caption:
        children.append(element("figcaption", caption))
    return element("figure", *children)


def picture(image: Any, *, title: str = "", caption: str = "") -> Markup:
    """Embeds a picture.

    Args:
      image: PIL image, or the path of an image file.
      title: shown in bold; also the alternative text.
      caption: shown beside it.

    Returns:
      A figure.

    Raises:
      ImageReadError: the path has no file, or no image.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(read_image(image, upright=True))
    data, kind = png_bytes(image.convert("RGB")), "png"
    if len(data) > _JPEG_ABOVE:
        # Photographs are several times smaller so, without a visible difference.
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "JPEG", quality=90, subsampling=0)
        data, kind = stream.getvalue(), "jpeg"
    shown = Markup(
        f'<img src="{_uri(data, kind)}" alt="{escape(title or caption or "picture")}" '
        f'width="{image.width}">'
    )
    words = [element("b", title)] if title else []
    if caption:
        words.append(escape(f" {caption}" if title else caption))
    note = [element("figcaption", *words)] if words else []
    return element("figure", shown, *note, class_="paper")


def text(value: Any) -> Any:
    """Formats a value for reading: numbers short, None and NaN as a dash, the rest as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(text(v)) for v in value)
    return str(value)


def duration(seconds: float) -> str:
    """Formats seconds as "12.3 s", "4 min 10 s" or "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Formats bytes in binary units: "39.6 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, facecolor=figure.get_facecolor())
    return stream.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
