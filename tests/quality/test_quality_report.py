"""The page: every number on it, nothing that runs or loads, hostile text as text, the same bytes each time."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from qwq_mlx.quality.report import ReportFacts, report_page
from qwq_mlx.quality.result import KL_EDGES, Quality, WorstToken
from qwq_mlx.quality.svg import bars, lines

HOSTILE = "<script>alert(1)</script>\n\t\x00\u202e&\"'"
FACTS = ReportFacts(
    title=f"4bit {HOSTILE}",
    source=f"a/b {HOSTILE}",
    recipe=f"# {HOSTILE}\n[weights]\nbits = 4\n",
    n_weights=1_234_567,
    source_bytes=2_469_134,
    output_bytes=700_000,
    bits_per_weight=4.512,
    tensor_errors={
        "model.layers.0.mlp.up_proj.weight": 0.09,
        "model.layers.1.mlp.up_proj.weight": 0.05,
        "model.layers.1.self_attn.q_proj.weight": 0.07,
        "lm_head.weight": 0.08,
    },
    versions={"mlx": f"1.0{HOSTILE}"},
)
QUALITY = Quality(
    text=f"essay{HOSTILE}.txt",
    text_sha256="ab" * 32,
    n_positions=1300,
    n_tokens=1200,
    kl=0.0123456,
    kl_median=0.001,
    kl_p99=0.2,
    kl_max=3.5,
    kl_histogram=(1000, *([0] * (len(KL_EDGES) - 1)), 200),
    top1_agreement=0.9512,
    reference_perplexity=3.25,
    perplexity=3.5,
    drift=(0.0, 0.02, 0.04),
    worst=(
        WorstToken(
            kl=3.5,
            window=0,
            position=7,
            context=HOSTILE,
            next="</mark>",
            reference="<b>",
            reference_p=0.9,
            model="&amp;",
            model_p=0.25,
        ),
    ),
)
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_number_is_on_the_page() -> None:
    page = Page(report_page(FACTS, QUALITY))
    assert page.open == []
    for shown in ("0.01235", "95.12 %", "3.25 → 3.5", "4.51", "2.5 MB → 0.7 MB", "1,234,567 weights", "1,200 tokens",
                  "100 more as context", "median 0.001, 99th percentile 0.2, largest 3.5 nats", "bits = 4",
                  "ab" * 32, "90 %", "25 %"):  # fmt: skip
        assert shown in page.text, shown


def test_nothing_runs_or_is_loaded_and_hostile_text_stays_text() -> None:
    raw = report_page(FACTS, QUALITY)
    page = Page(raw)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "b-", "form"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "<script" not in raw and "http://" not in raw and "https://" not in raw
    assert page.text.count("<script>alert(1)</script>") == 7
    assert "\x00" not in raw and "\u202e" not in raw
    assert "</mark>" in page.text and "&amp;" in page.text
    assert "url(" not in raw and "@import" not in raw
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert report_page(FACTS, QUALITY) == report_page(FACTS, QUALITY)


def test_a_conversion_that_rounded_no_layer_has_a_page_too() -> None:
    from dataclasses import replace

    assert report_page(FACTS, QUALITY).count("<figure>") == 3
    assert report_page(replace(FACTS, tensor_errors={"lm_head.weight": 0.1}), QUALITY).count("<figure>") == 2


def points(svg: str, index: int) -> list[tuple[float, float]]:
    found = re.search(rf'class="line s{index}" points="([^"]*)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_lines_lie_where_their_numbers_are() -> None:
    svg = lines({"one": [(0, 0.0), (1, 4.0), (2, 8.0)], "two": [(0, 2.0), (2, 2.0)]}, x_title="x", y_title="y")
    one, two = points(svg, 0), points(svg, 1)
    assert one[1][0] - one[0][0] == pytest.approx(one[2][0] - one[1][0], abs=0.11)
    assert one[0][1] - one[1][1] == pytest.approx(one[1][1] - one[2][1], abs=0.11)
    assert two[0][1] == two[1][1] == pytest.approx((3 * one[0][1] + one[2][1]) / 4, abs=0.11)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0", "2", "4", "6", "8"]
    assert svg.count('class="dot') == 5 and "<span>" in svg
    assert "<span>" not in lines({"one": [(0, 0.0)]}, x_title="x", y_title="y")


def test_bars_are_as_high_as_their_counts() -> None:
    svg = bars([4, 0, 1], ["a", "", "c"], x_title="x", y_title="y")
    heights = [float(each) for each in re.findall(r'class="bar"[^>]* height="([\d.]+)"', svg)]
    assert heights[1] == 0
    assert heights[0] == pytest.approx(4 * heights[2], abs=0.3)
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0", "1", "2", "3", "4"]
    assert "<title>4</title>" in svg
