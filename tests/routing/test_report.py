"""The report of routes: every number of the page is a cell of a CSV file, and no sentence exceeds its evidence."""

import csv
import dataclasses
import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chromium
import numpy as np
import planted_routes
import pytest

from bimedix_jax import cli
from bimedix_jax.commands.routes_report import largest_difference, not_claimed
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.claims import LEVELS, Gate
from bimedix_jax.routing.formats.imports import ImportOptions, import_routes
from bimedix_jax.routing.questions import analyse
from bimedix_jax.routing.recording import Recording
from bimedix_jax.routing.report import figures
from bimedix_jax.routing.report.contents import Described, contents_of
from bimedix_jax.routing.report.knockouts import read_interactions
from bimedix_jax.routing.report.page import render
from bimedix_jax.routing.report.sheets import NOT_TESTED
from bimedix_jax.routing.report.writing import ReportOptions, write_report
from bimedix_jax.routing.tables import Interaction, Tables

LAYERS, EXPERTS, RECORDS = 3, 4, 40
SETTINGS = {"recording": "R1", "records": 40, "tokens": 99, "unit": "record", "command": "c", "version": "0.1"}


def write_jsonl(
    path: Path, records: int = RECORDS, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0, **planted
) -> Path:
    """Records of two languages, whose specialties are Arabic or English words."""
    rng = np.random.default_rng(seed)
    found = planted_routes.recording(rng, records=records, layers=layers, experts=experts, **planted)
    routes, labels = found["routes"], found["groups"]["language"]
    with path.open("w") as file:
        for number in range(records):
            own = routes.record_N == number
            tokens = int(own.sum())
            record = {
                "id": f"r{number}",
                "language": labels[number],
                "specialty": ("طب القلب", "ward 7")[number % 3 == 0],
                "input_ids": routes.id_N[own].tolist(),
                "experts": routes.experts_LNK[:, own].tolist(),
                "weights": np.full((layers, tokens, 2), 0.5).tolist(),
                "nll": [1.0] * tokens,
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    folder = tmp_path_factory.mktemp("routes")
    given = write_jsonl(folder / "in.jsonl", by_token=1.5, by_language=0.8)
    import_routes([given], "jsonl", folder / "R", ImportOptions())
    return Recording.open(folder / "R")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    """Of the same tokens, whose routes do not depend on language."""
    folder = tmp_path_factory.mktemp("baseline")
    import_routes([write_jsonl(folder / "in.jsonl", by_token=1.5)], "jsonl", folder / "R", ImportOptions())
    return folder / "R"


@pytest.fixture(scope="module")
def report(recording, baseline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    options = ReportOptions(groups=("language", "specialty"), baseline=baseline, command="bimedix 3")
    write_report(recording, out, options)
    return out


@pytest.fixture(scope="module")
def wide_report(tmp_path_factory) -> Path:
    """Maps of so many experts that their cells have no room for numbers, and pairs of questions with answers."""
    folder = tmp_path_factory.mktemp("wide")
    given = write_jsonl(folder / "in.jsonl", layers=2, experts=20, by_language=0.8)
    lines = [json.loads(line) for line in given.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"pair": f"p{number // 2}", "labels": {"correct": str(number % 3 % 2)}}
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_routes([given], "jsonl", folder / "R", ImportOptions())
    write_report(Recording.open(folder / "R"), folder / "out", ReportOptions())
    return folder / "out"


@pytest.mark.parametrize("name", ["report", "wide_report"])
def test_the_page_is_legible_on_a_telephone_on_a_screen_and_in_print(name, request, browser):
    chromium.check(browser, request.getfixturevalue(name) / "report.html")


def test_print_without_colours_tells_series_and_signs_apart(report, wide_report):
    for folder in (report, wide_report):
        for picture in re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL):
            legend = re.findall(r'<circle [^>]*fill="([^"]*)"[^>]*stroke-width="2" />', picture)
            assert len({fill == "#fff" for fill in legend}) == len(legend)  # filled or open
    page, cells = (wide_report / "report.html").read_text(), cells_of(wide_report)["cells.csv"]
    below = [row for row in cells if row["expert"] and float(row["estimate"]) < 0]
    assert page.count("<path d=") == len(below)
    assert "A dash marks cells below zero" in page
    assert not re.search(r'class="cell"/><text [^>]*data-at="\w+.csv \d+ (estimate|share)"', page)
    largest = max(float(row["estimate"]) for row in cells if row["expert"])
    assert f">{100 * largest:+.1f}</text>" in page  # the key


class Reader(html.parser.HTMLParser):
    """The texts of a page with the elements around them, and all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.around: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.around, "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.around.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.around.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((data, list(self.around)))


def cells_of(folder: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            found[path.name] = list(csv.DictReader(file))
    return found


def stored(cells, at: str) -> str:
    name, row, column = at.split(" ", 2)
    return cells[name][int(row)][column]


def test_every_number_of_the_page_is_a_cell_of_a_csv_file(report):
    cells, checked = cells_of(report), 0
    for text, around in Reader((report / "report.html").read_text()).texts:
        marks = next(({name: str(x) for name, x in a.items()} for _, a in reversed(around) if "data-at" in a), None)
        if marks is None:
            is_name = any(tag in ("style", "a") for tag, _ in around)
            assert is_name or not re.search(r"\d", text), text
            continue
        value, scale = stored(cells, marks["data-at"]), float(marks.get("data-scale") or 1)
        checked += 1
        if text == value:
            continue
        if text == NOT_TESTED:
            assert value == "", marks
            continue
        decimals = len(re.sub(r"e.*", "", text).partition(".")[2])
        unit = 10.0 ** (int(text.partition("e")[2] or 0) - decimals)
        assert abs(float(text) - scale * float(value)) <= unit * 0.5000001, (text, marks)
    assert checked > 300


def test_points_and_whiskers_are_drawn_at_their_values(report):
    cells, page = cells_of(report), (report / "report.html").read_text()
    checked = 0
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ticks = re.findall(r'y="([\d.]+)"[^>]*class="tick" data-at="([^"]+)"', picture)
        if not ticks:
            continue
        places = [float(y) - 4 for y, _ in ticks]
        slope, start = np.polyfit([float(stored(cells, at)) for _, at in ticks], places, 1)
        for y, at in re.findall(r'<circle [^>]*cy="([\d.]+)"[^>]*data-at="([^"]+)"', picture):
            assert abs(start + slope * float(stored(cells, at)) - float(y)) < 0.1
            checked += 1
    assert checked == 2 * 2 * LAYERS + 3 * LAYERS  # divergence of choices and weights; three measures


def test_figures_name_layers_tokens_clusters_and_seed(report):
    cells = cells_of(report)
    assert len(cells["figures.csv"]) == (report / "report.html").read_text().count("<figcaption>")
    for row in cells["figures.csv"]:
        assert row["file"] in cells
        assert row["layers"] == "0 to 2"
        assert all(row[name] for name in ("tokens", "clusters", "unit", "seed", "title")), row


def test_the_page_makes_no_request(report):
    page = (report / "report.html").read_text()
    tags = Reader(page).tags
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in tags}
    links = [attrs[name] for _, attrs in tags for name in ("href", "src") if name in attrs]
    assert all(link == "data:," or (report / str(link)).is_file() for link in links)
    assert page.count("http") == page.count('xmlns="http://www.w3.org/2000/svg"') + page.count("http-equiv")
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_arabic_is_from_right_to_left(report):
    texts = Reader((report / "report.html").read_text()).texts
    arabic = [around for text, around in texts if re.match(r"[\d ]*[\u0600-\u06ff]", text)]
    assert len(arabic) > 3
    for around in arabic:
        assert any("rtl" in (attrs.get("dir"), attrs.get("direction")) for _, attrs in around), around


def test_texts_on_coloured_cells_are_legible():
    def luminance(rgb):
        linear = [(x / 255 / 12.92) if x / 255 <= 0.03928 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in rgb]
        return float(np.dot(list(linear), (0.2126, 0.7152, 0.0722)))

    for value in np.linspace(-1, 1, 81):
        fill, ink = figures.diverging(value, 1.0)
        parts = luminance(map(int, re.findall(r"\d+", fill))), float(ink == "#fff")
        assert (max(parts) + 0.05) / (min(parts) + 0.05) > 4.5, value
    below, above = (luminance(map(int, re.findall(r"\d+", figures.diverging(x, 1.0)[0]))) for x in (-1, 1))
    assert abs(below - above) < 0.1  # neither direction is darker in print; the sign is written


def test_claims_have_the_fields_of_their_format(report):
    claims = json.loads((report / "claims.json").read_text())
    assert {"gate", "questions", "claims", "refused", "exploration", "hashes", "command"} <= set(claims)
    assert claims["gate"] is None
    question = claims["questions"][0]
    names = {"name", "unit", "clusters", "icc", "family", "cells", "layers", "overlap", "token_mix", "within_token"}
    assert names <= set(question)
    cell = {"layer", "expert", "estimate", "low", "high", "p_adjusted", "mde80"}
    assert cell <= set(question["cells"][0])
    assert {"layer", "jsd", "low", "high", "geometry_percentile"} <= set(question["layers"][0])
    assert question["layers"][0]["geometry_percentile"] is None
    assert {claim["level"] for claim in claims["claims"]} <= set(LEVELS)
    assert set(claims["refused"][0]) == {"claim", "why"}
    assert claims["hashes"]["baseline"] not in (None, claims["hashes"]["recording"])
    learned = [one["why"] for one in claims["refused"] if "learned in fine-tuning" in one["claim"]]
    assert set(learned) == {"not tested, because it needs the level geometry, which was not tested"}
    assert question["level"] == "token"


def test_a_report_is_the_same_bytes_again(recording, baseline, report, tmp_path):
    options = ReportOptions(groups=("language", "specialty"), baseline=baseline, command="bimedix 3")
    write_report(recording, tmp_path / "out", options)
    for path in sorted(report.iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def page_of(analysis) -> str:
    described = Described(layers=range(LAYERS), loads=(), measures=(), dead=(), roles=())
    return render(contents_of(analysis, described, SETTINGS))


@pytest.fixture(scope="module")
def functional():
    """Routes that depend on language in every way that a recording can show."""
    rng = np.random.default_rng(3)
    found = planted_routes.recording(rng, records=RECORDS, layers=LAYERS, by_token=1.0, by_language=1.2)
    shape = found["counts_RLE"].shape
    tokens_R, random = found["tokens_R"], np.random.default_rng(4)
    even_RLE = np.round(np.repeat(found["counts_RLE"].sum(-1, keepdims=True) / EXPERTS, EXPERTS, -1))
    drawn_MLRE = random.multinomial(2 * tokens_R, np.full(EXPERTS, 0.25), (100, LAYERS, RECORDS))
    tables = Tables(
        **found,
        random_RMLE=drawn_MLRE.transpose(2, 0, 1, 3),
        baseline_RLE=even_RLE + random.integers(0, 9, shape),
        nll_R=np.ones(RECORDS),
        shuffled_nll_R=1.5 + 0.1 * random.random(RECORDS),
        interactions=[
            Interaction(field="language", layer=layer, expert=expert, estimate=0.2, p_adjusted=0.001)
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
        ],
    )
    return analyse(tables, explore=False)


def test_only_what_is_functional_is_called_specialised(functional):
    assert functional.questions[0].level == "functional"
    page = page_of(functional)
    assert "specialised" in page
    assert "<b>holds</b>" in page


@pytest.mark.parametrize("gate", [None, (0.0, 0.0, 0.0, False), (0.1, None, None, None)])
def test_without_the_gate_nothing_is_specialised(functional, gate):
    rng = np.random.default_rng(3)
    found = planted_routes.recording(rng, records=RECORDS, layers=LAYERS, by_token=1.0, by_language=1.2)
    if gate is not None:
        found |= {"nll_R": np.ones(RECORDS), "shuffled_nll_R": np.ones(RECORDS)}
    analysis = analyse(Tables(**found), explore=False)
    if gate is not None:
        delta, low, high, diverged = gate
        known = Gate(delta_nll=delta, low=low, high=high, floor=1e-4, diverged=diverged)
        analysis = dataclasses.replace(analysis, gate=known)
    page = page_of(analysis)
    assert "specialis" not in page + json.dumps(analysis.to_dict())
    assert ("<b>fails</b>" in page) == (gate is not None and gate[3] is False)
    assert "Not claimed" in page


def test_the_command_writes_what_it_prints(recording, tmp_path, capsys):
    knockout = tmp_path / "k.json"
    rows = [{"field": "language", "layer": 1, "expert": 2, "estimate": 0.1, "p_adjusted": 0.01}]
    knockout.write_text(json.dumps({"interactions": rows, "hashes": {"data": recording.manifest.hashes["data"]}}))
    command = ["routes", "report", str(recording.folder), "--out", str(tmp_path / "out"), "--no-figures"]
    assert cli.main([*command, "--knockout", str(knockout), "--unit", "record", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "claims.json").read_text())
    assert printed["command"].startswith("bimedix routes report ")
    assert "--no-figures" in printed["command"]
    found = [cell for cell in printed["questions"][0]["cells"] if cell["interaction"] is not None]
    assert [(cell["layer"], cell["expert"]) for cell in found] == [(1, 2)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" not in page
    assert (tmp_path / "out" / "load.csv").is_file()
    assert cli.main(command) == 1
    assert "exists" in capsys.readouterr().err


def test_the_terminal_has_a_line_for_each_question(report):
    claims = json.loads((report / "claims.json").read_text())
    lines = not_claimed(claims["refused"])
    assert len(lines) == len(claims["questions"]) + 1 < len(claims["refused"])  # the last one is about answers
    assert lines[0].startswith("not claimed: routes depend on language: beyond geometry (not tested: no random router")
    assert "; nor learned in fine-tuning, functional, " in lines[0]
    cell = max(claims["questions"][0]["cells"], key=lambda cell: abs(cell["estimate"]))
    place = f"ar minus en, layer {cell['layer']}, expert {cell['expert']}"
    assert largest_difference(claims["questions"][0]) == f"{100 * cell['estimate']:+.1f} points, {place}"
    untested = {"groups": ["a", "b"], "cells": [cell | {"estimate": None}]}
    assert largest_difference(untested) == largest_difference(untested | {"cells": []}) == ""
    distances = {"groups": ["a", "b"], "cells": [cell | {"expert": None}]}
    assert largest_difference(distances) == ""


def test_what_does_not_belong_together_is_refused(recording, tmp_path):
    for options, message in [
        (ReportOptions(groups=("ward",)), "the field ward of records is not available"),
        (ReportOptions(unit="document"), "document of records is not available: .* the reader `tico19` supplies it"),
        (ReportOptions(groups=("language", "specialty", "language")), "have language twice; name each field once"),
        (ReportOptions(unit="ward"), "the field ward of records is not available"),
        (ReportOptions(baseline=tmp_path), "manifest.json"),
    ]:
        with pytest.raises(BimedixError, match=message):
            write_report(recording, tmp_path / "out", options)
    path = tmp_path / "k.json"
    row = {"field": "language", "layer": 9, "expert": 0, "estimate": 0.1, "p_adjusted": 0.01}
    for value, message in [
        ({"interactions": [row]}, "layer 9, expert 0"),
        ({"interactions": [], "hashes": {"data": "0" * 64}}, "another data"),
        ({"interactions": [], "more": 1}, "unknown key"),
        ({"interactions": [row | {"layer": 1}, row | {"layer": 1, "p_adjusted": 0.9}]}, "layer 1, expert 0 twice"),
        ({"interactions": [row | {"field": "languag"}]}, "field 'languag', but .* has language, specialty"),
        ({"interactions": [row | {"languag": "ar"}]}, "unknown key.*languag"),
        ({"interactions": [row | {"p_adjusted": 4}]}, "p_adjusted = 4, but it should be less than or equal to 1"),
        ({"interactions": [row | {"p_adjusted": -0.1}]}, "p_adjusted = -0.1"),
        ({"interactions": [row | {"expert": -1}]}, "expert = -1"),
        ({"interactions": [row | {"estimate": "0.1"}]}, "estimate = '0.1'"),
    ]:
        path.write_text(json.dumps(value))
        with pytest.raises(BimedixError, match=message):
            write_report(recording, tmp_path / "out", ReportOptions(knockout=path))
    tried = row | {"layer": 1, "groups": ["ar", "en"], "meaning": "swap", "clusters": {}}
    manifest = {"hashes": {}, "version": "1", "hash": "0"}
    for rows, message in [([tried, tried | {"p_adjusted": 0.9}], "expert 0, swap, ar and en twice"),
                          ([tried | {"p_adjusted": 4}], "p_adjusted = 4")]:  # fmt: skip
        path.write_text(json.dumps({"interaction": rows, "manifest": manifest}))
        with pytest.raises(BimedixError, match=message):
            write_report(recording, tmp_path / "out", ReportOptions(knockout=path))
    path.write_text(json.dumps({"interaction": [tried, tried | {"meaning": "ban", "p_adjusted": 0.001}],
                                "manifest": manifest}))  # fmt: skip
    assert [one.p_adjusted for one in read_interactions(path, recording)] == [0.001]
    assert not (tmp_path / "out").exists()


def test_a_unit_that_divides_declared_clusters_is_warned_about(tmp_path):
    given = write_jsonl(tmp_path / "in.jsonl", layers=2)
    lines = [json.loads(line) for line in given.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {"document": f"d{number // 4}"}
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_routes([given], "jsonl", tmp_path / "R", ImportOptions())
    recording = Recording.open(tmp_path / "R")
    for unit, warned in [("record", "10 of 10"), ("specialty", "10 of 10"), ("document", None), (None, None)]:
        claims = write_report(recording, tmp_path / str(unit), ReportOptions(unit=unit, pictures=False))
        found = [text for text in claims["warnings"] if "levels too high" in text]
        assert len(found) == (warned is not None)
        page = (tmp_path / str(unit) / "report.html").read_text()
        assert ("levels too high" in page) == (warned is not None)
        if warned is not None:
            assert f"the unit is the {unit}, but {warned} values of document" in found[0]
            assert "without --unit, the unit is the document" in found[0]


def test_few_clusters_and_absent_fields_are_not_tested(tmp_path):
    import_routes([write_jsonl(tmp_path / "in", records=8)], "jsonl", tmp_path / "R", ImportOptions())
    claims = write_report(Recording.open(tmp_path / "R"), tmp_path / "out", ReportOptions())
    assert claims["claims"] == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>not tested</b>: <span" in page
    assert "estimates only" in page


CHECK = """
import sys, time
from bimedix_jax import cli
made, out = sys.argv[1:]
assert cli.main(["routes", "import", made, "--format", "jsonl", "--out", out + "/R"]) == 0
assert cli.main(["routes", "report", out + "/R", "--out", out + "/report"]) == 0
assert not {"jax", "pandas", "scipy.stats"} & set(sys.modules)  # the others take half a second each
print(time.process_time())
"""


def test_import_and_report_of_80_records_take_5_seconds_without_jax(tmp_path):
    made = write_jsonl(tmp_path / "in.jsonl", records=80, layers=8, by_token=1.0)
    command = [sys.executable, "-c", CHECK, str(made), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 5  # of the CPU; other tests run at the same time
