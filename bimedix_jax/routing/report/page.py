"""The page of a report: one HTML file without requests, legible in print, from right to left where it is Arabic."""

import html
from collections.abc import Callable, Sequence

from bimedix_jax.notice import NOTICE_AR, NOTICE_EN
from bimedix_jax.routing.answers import DIFFERENT, SAME
from bimedix_jax.routing.answers import NAME as ANSWERS
from bimedix_jax.routing.report import answers, figures, sentences
from bimedix_jax.routing.report.contents import Contents
from bimedix_jax.routing.report.figures import Mark
from bimedix_jax.routing.report.maps import LETTERS, difference_map, is_written, level_map, load_map
from bimedix_jax.routing.report.sheets import Sheet, interval, number, table, words

MOST_CELLS = 12
"""Rows of the table of cells; all of them are in the CSV file."""
STYLE = """
body{font:15px/1.5 system-ui,"Noto Naskh Arabic",sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;
background:#fff}
h2{margin-top:2.5rem;border-bottom:1px solid #bbb}h3{margin-top:1.6rem}
table{border-collapse:collapse;margin:.7rem 0;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #ccc;padding:.2rem .7rem;text-align:right;vertical-align:top}
th:first-child,td:first-child,.prose th,.prose td{text-align:left}
td{white-space:nowrap}.prose td{white-space:normal}
.scroll{overflow-x:auto}figure{margin:1.2rem 0}figcaption{font-size:13px;color:#444}
svg{height:auto;font:11px system-ui,sans-serif;print-color-adjust:exact}
.cell{stroke:#ddd;stroke-width:.5}.claimed{fill:none;stroke:#000;stroke-width:2}
.notice,.verdict{border-inline-start:4px solid #b35806;padding:.3rem 1rem}.verdict{border-color:#2166ac}
code{overflow-wrap:anywhere}[dir=rtl]{text-align:right}
@media print{body{max-width:none;margin:0;font-size:10pt}table{font-size:8.5pt}figcaption{font-size:8.5pt}
svg{max-width:100%}.scroll{overflow:visible}td{white-space:normal}
h2,h3{break-after:avoid}figure,tr,.verdict,.notice{break-inside:avoid}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Page:
    """Parts of the page in order, and the figures that they have."""

    def __init__(self, contents: Contents, pictures: bool):
        self.contents, self.pictures = contents, pictures
        self.parts: list[str] = []

    def add(self, *parts: str) -> None:
        self.parts += parts

    def heading(self, text: str, level: int = 2) -> None:
        """`text` is HTML."""
        self.add(f"<h{level}>{text}</h{level}>")

    def figure(
        self,
        sheet: Sheet,
        title: str,
        note: str,
        draw: Callable[[int], str],
        about: dict[str, str],
        question: str | None = None,
    ) -> None:
        """A figure with the layers, tokens, clusters and seed that it shows; `note` is HTML."""
        listed = self.contents.figures
        row = listed.add(
            len(listed.rows) + 1, sheet.name, question, title, *(about[name] for name in listed.columns[4:])
        )
        of = {name: words(listed, row, name) for name in ("figure", "layers", "tokens", "clusters", "unit", "seed")}
        caption = (
            f"<b>Figure {of['figure']}. {html.escape(title)}.</b> {note} Layers {of['layers']}; tokens: "
            f"{of['tokens']}; clusters ({of['unit']}): {of['clusters']}; seed {of['seed']}. "
            f'Data: <a href="{sheet.name}">{sheet.name}</a>.'
        )
        picture = f'<div class="scroll">{draw(len(listed.rows))}</div>' if self.pictures else ""
        self.add(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")


def render(contents: Contents, pictures: bool = True) -> str:
    """The page as HTML. Adds its figures and their axes to the sheets."""
    page = Page(contents, pictures)
    page.heading("In short")
    page.add(f'<p class="verdict">{sentences.gate_sentence(contents)}</p>')
    for row in range(len(contents.questions.rows)):
        page.add(f'<p class="verdict">{sentences.question_sentence(contents, row)}</p>')
    page.heading("What this does not say")
    rows = sentences.refusals(contents)
    page.add(table(("not claimed", "why"), rows, prose=True) if rows else "<p>Nothing was refused.</p>")
    page.add(*(f"<p>{text}</p>" for text in sentences.warnings(contents)))
    for row in range(len(contents.questions.rows)):
        question(page, row)
    exploration(page)
    description(page)
    made(page)
    return document(page)


def question(page: Page, row: int) -> None:
    """The section of a question."""
    contents, sheet = page.contents, page.contents.questions
    name = sheet.value(row, "question")
    asked = "Are routes associated with {}?" if name == ANSWERS else "Do routes depend on {}?"
    page.heading(asked.format(words(sheet, row, "question")))
    page.add(facts(contents, row))
    cells = contents.cells.where(question=name)
    about = {key: sheet.value(row, key) for key in ("tokens", "clusters", "unit")}
    about["layers"] = spanned([contents.cells.value(at, "layer") for at in cells])
    about["seed"] = contents.settings.shown("seed").text
    if name == ANSWERS:
        answered(page, cells, about)
        return
    difference_figures(page, row, cells, about)
    load_figures(page, name, about)
    layers = contents.layers.where(question=name)
    if layers:
        page.figure(
            contents.layers,
            "Divergence by layer",
            "Jensen-Shannon divergence of the groups' loads in nats, less its bias in resamples of the clusters. An "
            "estimate or an end below zero is chance.",
            lambda number_of: layer_plot(contents, layers, number_of),
            about,
            name,
        )
        page.add(layer_table(contents, layers))
    if sheet.value(row, "distance") is not None:
        note = (
            "The groups' different words, the routes of the same token id, and ids that one group alone uses, in "
            "points of the distance of the loads, mean over layers."
        )
        page.figure(sheet, "Parts of the difference", note, lambda _: split_bars(contents, row), about, name)


def answered(page: Page, cells: list[int], about: dict[str, str]) -> None:
    """The distances of the routes of pairs."""
    note = (
        "Squared Euclidean distance of the loads of a question and its translation, without what few tokens add by "
        f"chance: pairs with {DIFFERENT}, less pairs with {SAME}."
    )
    contents = page.contents
    title = "Distance of the routes and answers"
    page.figure(contents.cells, title, note, lambda of: answers.answers_plot(contents, cells, of), about, ANSWERS)
    page.add(answers.answers_table(contents, cells))


def difference_figures(page: Page, row: int, cells: Sequence[int], about: dict[str, str]) -> None:
    """The differences of the loads, and the level of each claim."""
    contents, sheet = page.contents, page.contents.questions
    name, tested = sheet.value(row, "question"), sheet.value(row, "level") is not None
    note = f"{words(sheet, row, 'first')} minus {words(sheet, row, 'second')}, in points of the layer's choices. "
    note += (
        "Outlined: claimed, at least as an association. Others are not resolved, or equivalent."
        if tested
        else "Not tested: these are estimates only."
    )
    written = is_written(contents.cells, cells)
    note += "" if written else " A dash marks cells below zero."
    page.figure(contents.cells, "Difference in load", note, lambda _: difference_map(contents, cells), about, name)
    if tested:
        page.add(strongest(contents, cells))
        key = "; ".join(f"{letter}: {level}" for level, letter in LETTERS.items()) + "." if written else ""
        page.figure(contents.cells, "Level of each claim", key, lambda _: level_map(contents, cells), about, name)


def load_figures(page: Page, name: str, about: dict[str, str]) -> None:
    """The load of each group of a question."""
    sheet = page.contents.load
    for group in dict.fromkeys(sheet.value(at, "group") for at in sheet.where(question=name)):
        places = sheet.where(question=name, group=group)
        note = f"Percent of the layer's choices, mean over the clusters of {words(sheet, places[0], 'group')}."
        own = about | {key: str(sheet.value(places[0], key)) for key in ("tokens", "clusters")}
        page.figure(sheet, "Load", note, lambda _, at=places: load_map(page.contents, at), own, name)


def facts(contents: Contents, row: int) -> str:
    """The table of what was compared."""
    sheet = contents.questions
    way = "signs flipped within clusters" if sheet.value(row, "paired") else "labels permuted among clusters"
    rows = [
        ("groups", f"{words(sheet, row, 'first')} and {words(sheet, row, 'second')}"),
        ("clusters", f"{words(sheet, row, 'clusters')} (unit: {words(sheet, row, 'unit')})"),
        ("tokens", words(sheet, row, "tokens")),
        ("test", f"{way}, {contents.settings.shown('permutations')} times, adjusted for {words(sheet, row, 'family')} "
                 "cells (max-T) and for the questions (Holm)"),
        ("intra-class correlation, design effect",
         f"{number(sheet, row, 'icc')}, {number(sheet, row, 'design_effect')}"),
        ("tokens whose id both groups use, in percent", number(sheet, row, "overlap", ".1f", 100)),
    ]  # fmt: skip
    return table(("what", "value"), rows, prose=True)


def marks(sheet: Sheet, places: Sequence[int], columns: tuple[str, str | None, str | None]) -> list[Mark | None]:
    """A mark for each row; None where there is no estimate."""
    found = []
    for at in places:
        value, low, high = (None if name is None else _finite(sheet.value(at, name)) for name in columns)
        at_cell = f"{sheet.name} {at} {columns[0]}"
        found.append(None if value is None else Mark(value=value, low=low, high=high, at=at_cell))
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value else value


def layer_plot(contents: Contents, places: Sequence[int], number_of: int) -> str:
    sheet = contents.layers
    series = [("choices", marks(sheet, places, ("jsd", "low", "high")))]
    if any(sheet.value(at, "soft_jsd") is not None for at in places):
        series.append(("weights", marks(sheet, places, ("soft_jsd", None, None))))
    names = [words(sheet, at, "layer") for at in places]
    return figures.columns_plot(contents.axes, number_of, names, series, "divergence of the groups' loads by layer")


def layer_table(contents: Contents, places: Sequence[int]) -> str:
    sheet = contents.layers
    head = (
        "layer", "divergence of choices", "of weights", "random routers below, percent", "p of geometry",
        "token id predicts, nats", "group beyond id, nats",
    )  # fmt: skip
    rows = [
        (
            words(sheet, at, "layer"),
            interval(sheet, at, ("jsd", "low", "high"), ".2g"),
            number(sheet, at, "soft_jsd", ".2g"),
            number(sheet, at, "geometry_percentile", ".0f"),
            number(sheet, at, "p_geometry", ".3g"),
            interval(sheet, at, ("vocabulary_nats", "vocabulary_low", "vocabulary_high"), ".2g"),
            interval(sheet, at, ("language_nats", "language_low", "language_high"), ".2g"),
        )
        for at in places
    ]
    return table(head, rows)


def strongest(contents: Contents, places: Sequence[int]) -> str:
    """The table of the cells with the smallest p-values."""
    sheet = contents.cells
    chosen = sorted(places, key=lambda at: (sheet.value(at, "p_adjusted"), -abs(sheet.value(at, "estimate"))))
    head = ("layer, expert", "difference, points", "p adjusted", "detectable, points", "verdict", "level")
    rows = [
        (
            f"{words(sheet, at, 'layer')}, {words(sheet, at, 'expert')}",
            interval(sheet, at, ("estimate", "low", "high"), "+.1f", 100),
            number(sheet, at, "p_adjusted", ".3g"),
            number(sheet, at, "mde80", ".1f", 100),
            words(sheet, at, "verdict"),
            words(sheet, at, "level"),
        )
        for at in chosen[:MOST_CELLS]
    ]
    return table(head, rows)


def split_bars(contents: Contents, row: int) -> str:
    names = {"token_mix": "other words", "within_token": "same token id", "unshared": "ids of one group"}
    sheet = contents.questions
    found = [
        (label, number(sheet, row, name, "+.2f", 100), sheet.value(row, name) or 0.0) for name, label in names.items()
    ]
    return figures.bars(found, "parts of the difference of the loads")


def exploration(page: Page) -> None:
    sheet = page.contents.exploration
    if not sheet.rows:
        return
    page.heading("Exploration: no claims")
    page.add(
        "<p>The first of many candidates that were tried, with the false discovery rate q at which each would be found "
        "(Benjamini and Hochberg). A single row of this table supports nothing.</p>"
    )
    rows = [
        (
            words(sheet, at, "what"),
            words(sheet, at, "layer"),
            words(sheet, at, "experts"),
            number(sheet, at, "estimate", "+.3g"),
            number(sheet, at, "q", ".2g"),
        )
        for at in range(len(sheet.rows))
    ]
    page.add(table(("what", "layer", "experts", "difference or lift", "q"), rows))


def description(page: Page) -> None:
    """Measures without a test, dead experts, and the tokens that were kept apart."""
    contents, sheet = page.contents, page.contents.measures
    page.heading("Description: no tests")
    for name in dict.fromkeys(sheet.value(at, "measure") for at in range(len(sheet.rows))):
        places = sheet.where(measure=name)
        about = {
            "layers": spanned([sheet.value(at, "layer") for at in places]),
            "tokens": contents.settings.shown("tokens").text,
            "clusters": str(sheet.value(places[0], "clusters")),
            "unit": contents.settings.shown("unit").text,
            "seed": contents.settings.shown("seed").text,
        }
        note = f"{html.escape(sheet.value(places[0], 'what').capitalize())}."
        page.figure(
            sheet, name.capitalize(), note, lambda of, at=places, name=name: measure_plot(contents, at, of, name), about
        )
    dead = contents.dead
    if dead.rows:
        page.heading("Experts that no token chose", 3)
        rows = [
            (words(dead, at, "layer"), words(dead, at, "expert"), number(dead, at, "bound", ".1f", 100))
            for at in range(len(dead.rows))
        ]
        page.add(table(("layer", "expert", "at most this percent of clusters use it"), rows))
    roles = contents.roles
    if roles.rows:
        page.heading("Tokens by role", 3)
        rows = [
            (words(roles, at, "role"), words(roles, at, "tokens"), "yes" if roles.value(at, "counts") else "kept apart")
            for at in range(len(roles.rows))
        ]
        page.add(table(("role", "tokens", "counted"), rows))


def measure_plot(contents: Contents, places: Sequence[int], number_of: int, name: str) -> str:
    sheet = contents.measures
    names = [words(sheet, at, "layer") for at in places]
    series = [(name, marks(sheet, places, ("mean", "low", "high")))]
    return figures.columns_plot(contents.axes, number_of, names, series, f"{name} by layer")


def made(page: Page) -> None:
    """How the report was made, and its files."""
    page.heading("How this was made")
    rows = [(html.escape(name), f"<code>{x}</code>") for name, x in page.contents.settings]
    page.add(table(("what", "value"), rows, prose=True))
    names = ["claims.json", *(sheet.name for sheet in page.contents.sheets)]
    page.add("<p>Files: " + ", ".join(f'<a href="{name}">{name}</a>' for name in names) + ".</p>")


def spanned(layers: Sequence[int]) -> str:
    """'0 to 7', or the numbers where some between are missing."""
    found = sorted(set(layers))
    if len(found) > 1 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def document(page: Page) -> str:
    title = f"Routes of {page.contents.settings.shown('recording')}"
    notice = (
        f'<p class="notice" lang="en">{html.escape(NOTICE_EN)}</p>'
        f'<p class="notice" lang="ar" dir="rtl">{html.escape(NOTICE_AR)}</p>'
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>Routes</title><style>{STYLE}</style></head><body><h1>{title}</h1>{notice}"
        f"{''.join(page.parts)}</body></html>\n"
    )
