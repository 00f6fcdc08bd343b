"""report.html: one page that shows what a conversion lost, beside its size. No scripts, nothing loaded from elsewhere.

The page is a function of the record and the facts given, without times or dates, so the same conversion gives the same
bytes. Whatever comes from a model, a text or a folder is escaped, and control characters are shown as symbols.

Does not: measure, or judge what is good enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from qwq_mlx.quality.result import KL_EDGES, Quality, WorstToken
from qwq_mlx.quality.svg import bars, lines
from qwq_mlx.quant.recipe import layer_of

__all__ = ["PAGE_STYLE", "REPORT_NAME", "ReportFacts", "printable", "report_page", "size_text"]

REPORT_NAME = "report.html"

_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --rule: #dde2e7; --card: #f5f7f9; --page: #fff;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #db2777; --c4: #7c3aed; --c5: #0891b2; --c6: #dc2626; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --rule: #333b44; --card: #1d232a;
  --page: #14181d; --c0: #6b9bff; --c1: #f2a93b; --c2: #3cc493; --c3: #f472b6; --c4: #a98bff; --c5: #3fc3dd;
  --c6: #f87171; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 980px;
  margin: 2.2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .soft, figcaption { color: var(--soft); font-size: .88rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; }
.card span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1.4rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } .legend { font-size: .82rem; color: var(--soft); }
.legend span { margin-right: .9rem; white-space: nowrap; } .legend svg { width: 18px; margin-right: .3rem; }
svg text { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--rule); } .bar { fill: var(--c0); }
.line { fill: none; stroke-width: 1.7; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .dot { fill: var(--page); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
td, th { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: .85rem ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit; border-radius: 3px; padding: 0 2px; }
"""
"""Style sheet of a page with plots, light or dark as the reader's system is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """What stands beside the numbers.

    source: in words. recipe: its TOML text. tensor_errors: tensor -> relative error of its rounding, where it was
    rounded. versions: program -> version.
    """

    title: str
    source: str
    recipe: str
    n_weights: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    tensor_errors: Mapping[str, float]
    versions: Mapping[str, str]


def report_page(facts: ReportFacts, quality: Quality) -> str:
    """The page as HTML text."""
    title = escape(printable(facts.title))
    versions = ", ".join(f"{name} {value}" for name, value in sorted(facts.versions.items()))
    return "".join(
        (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}: what it lost</title>\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n",
            f"<style>{PAGE_STYLE}</style>\n<h1>{title}</h1>\n",
            f'<p class="soft">from {escape(printable(facts.source))}, {facts.n_weights:,} weights</p>\n',
            _cards(facts, quality),
            f"<p>Measured on <b>{escape(printable(quality.text))}</b>: {quality.n_tokens:,} tokens with "
            f"{quality.n_positions - quality.n_tokens:,} more as context, each predicted by the source and by the "
            "conversion from the same text before it, in float32. "
            "KL is the divergence of the conversion's distribution from the source's, in nats; 0 is no loss.</p>\n",
            _plots(facts, quality),
            _worst(quality.worst),
            f"<h2>Recipe</h2>\n<pre><code>{escape(printable(facts.recipe, keep=chr(10)))}</code></pre>\n",
            f'<p class="soft">{escape(printable(versions))}<br>text: sha256 {escape(quality.text_sha256)}<br>'
            "The same numbers are in manifest.json, which has this page's digest.</p>\n</html>\n",
        )
    )


def _cards(facts: ReportFacts, quality: Quality) -> str:
    cards = (
        (f"{quality.kl:.4g}", "mean KL, nats a token"),
        (f"{100 * quality.top1_agreement:.2f} %", "same most likely token"),
        (f"{quality.reference_perplexity:.4g} → {quality.perplexity:.4g}", "perplexity, before → after"),
        (f"{facts.bits_per_weight:.3g}", "bits per weight"),
        (f"{size_text(facts.source_bytes)} → {size_text(facts.output_bytes)}", "size, before → after"),
    )
    inner = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)
    return f'<div class="cards">{inner}</div>\n'


def _plots(facts: ReportFacts, quality: Quality) -> str:
    drift = {"drift": [(float(layer), 100 * value) for layer, value in enumerate(quality.drift)]}
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for kind in _KINDS:
        points = sorted(
            (float(layer) + 1, 100 * error)
            for name, error in facts.tensor_errors.items()
            if name.endswith(f".{kind}.weight") and (layer := layer_of(name)) is not None
        )
        if points:
            by_kind[kind.removesuffix("_proj")] = points
    labels = [
        *(f"{edge:g}" if place % 2 == 0 and place < len(KL_EDGES) - 1 else "" for place, edge in enumerate(KL_EDGES)),
        "more",
    ]
    figures = [
        (
            bars(quality.kl_histogram, labels, x_title="KL up to, nats", y_title="tokens"),
            f"How the loss is spread: median {quality.kl_median:.3g}, 99th percentile {quality.kl_p99:.3g}, "
            f"largest {quality.kl_max:.3g} nats.",
        ),
        (
            lines(drift, x_title="layer (0: embedding)", y_title="drift, %"),
            "How far hidden states are from the source's after each layer: mean relative error over all positions.",
        ),
    ]
    if by_kind:
        figures.append(
            (
                lines(by_kind, x_title="layer", y_title="weight error, %"),
                "Rounding alone: relative error of each matrix's weights.",
            )
        )
    inner = "".join(f"<figure>{plot}<figcaption>{text}</figcaption></figure>\n" for plot, text in figures)
    return f'<h2>Where it was lost</h2>\n<div class="plots">{inner}</div>\n'


def _worst(tokens: Sequence[WorstToken]) -> str:
    rows = "".join(
        f'<tr><td class="n">{token.kl:.3g}</td><td><code>{escape(printable(token.context))}'
        f"<mark>{escape(printable(token.next))}</mark></code></td>"
        f"<td><code>{escape(printable(token.reference))}</code> {100 * token.reference_p:.0f} %</td>"
        f"<td><code>{escape(printable(token.model))}</code> {100 * token.model_p:.0f} %</td></tr>\n"
        for token in tokens
    )
    return (
        "<h2>Tokens that changed most</h2>\n<table><tr><th class='n'>KL</th><th>text, and the token it has next</th>"
        f"<th>source finds likeliest</th><th>conversion</th></tr>\n{rows}</table>\n"
    )


def size_text(n_bytes: int) -> str:
    """A size for people: "18.44 GB", "13.2 MB"."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def printable(text: str, keep: str = "") -> str:
    """Line breaks and other characters that would not be seen, as symbols."""
    text = text.replace("\n", "\n" if "\n" in keep else "⏎").replace("\t", "⇥")
    return "".join(each if each.isprintable() or each in keep else "�" for each in text)
