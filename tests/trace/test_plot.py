"""The picture of a trace: what is drawn, and what is said where it cannot be."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwq_mlx.errors import GenerationError, OptionError
from qwq_mlx.trace.plot import plot_trace, smoothed
from qwq_mlx.trace.stated_answers import Candidate, candidates
from qwq_mlx.trace.trace import Injection, Timings, Trace

TEXTS = (
    "So ",
    "the answer is ",
    "41.\n",
    "Wait, ",
    "the answer is 42.\n\n",
    "**Final",
    " Answer**\n\n",
    "\\boxed{$5}",
    "",
)


@pytest.fixture
def trace() -> Trace:
    text = "".join(TEXTS)
    return Trace(
        question="x",
        prompt_ids=(1,),
        ids=tuple(range(9)),
        text=text,
        texts=TEXTS,
        thinking=text[:50],
        conclusion=text[50:],
        answer="$5",
        answer_kind="box",
        is_revised=False,
        confidence=1.0,
        thinking_span=(0, 5),
        conclusion_span=(5, 9),
        finish_reason="loop",
        detail="",
        logprobs=(-0.1, -0.2, None, *[-0.3] * 6),
        entropies=(1.0, 0.5, None, *[0.25] * 6),
        injections=(Injection(start=2, end=3, text="x", reason="loop"),),
        timings=Timings(n_prefilled=1, prefill_s=1.0, n_intervals=8, decode_s=1.0),
        peak_bytes=1,
        settings={},
        model={"name": "tiny $model"},
        events=({"event": "loop", "start": 0, "end": 99}, {"event": "switch", "start": 1, "end": 2}),
    )


def test_candidates_are_the_stated_answers_with_their_tokens() -> None:
    assert candidates(TEXTS) == [Candidate(2, "41"), Candidate(4, "42"), Candidate(8, "5")]
    assert candidates(()) == [] and candidates(("nothing here\n", "more")) == []


def test_the_picture_has_segments_candidates_loops_and_curves(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_trace(trace, tmp_path / "trace.svg")
    svg = (tmp_path / "trace.svg").read_text()
    # matplotlib writes each text it draws as a comment beside its outline
    for text in ("thinking", "answer", "loop", "answer asked for", "stated answer", "mean over 1", "entropy (nats)"):
        assert f"<!-- {text} -->" in svg, text
    for text in ("41", "42", "log-probability (nats)", "output token"):
        assert f"<!-- {text} -->" in svg, text
    assert "<!-- tiny $model: 9 tokens, loop, answer '$5' -->" in svg, "no mathematics is read into it"
    plain = dataclasses.replace(trace, events=(), injections=(), conclusion_span=None, texts=("a",) * 9, text="a" * 9)
    plot_trace(plain, tmp_path / "plain.svg")
    svg = (tmp_path / "plain.svg").read_text()
    assert all(f"<!-- {text} -->" not in svg for text in ("loop", "answer", "stated answer", "answer asked for"))
    plot_trace(trace, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("window", [1, 3, 7])
def test_the_mean_leaves_unknown_tokens_out(window: int) -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan, np.nan, 2.0, 8.0])
    half = window // 2
    expected = [
        np.mean(known) if (known := [v for v in values[max(0, i - half) : i + half + 1] if not np.isnan(v)]) else np.nan
        for i in range(len(values))
    ]
    np.testing.assert_allclose(smoothed(values, window), expected)


def test_what_cannot_be_drawn_is_refused(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"t\.gif: is no picture's name, expected one that ends in \.png, \.pdf"):
        plot_trace(trace, tmp_path / "t.gif")
    with pytest.raises(OptionError, match="The trace has no tokens, so there is nothing to draw"):
        plot_trace(dataclasses.replace(trace, ids=()), tmp_path / "t.png")
    with monkeypatch.context() as patched:
        real = importlib.import_module

        def missing(name: str) -> Any:
            if name.startswith("matplotlib"):
                raise ImportError("No module named 'matplotlib'")
            return real(name)

        patched.setattr(importlib, "import_module", missing)
        with pytest.raises(OptionError, match=r"Drawing needs matplotlib \(No module .*pip install 'qwq-mlx\[plot\]'"):
            plot_trace(trace, tmp_path / "t.png")
    pytest.importorskip("matplotlib")
    with pytest.raises(GenerationError, match=r"t\.png: the picture cannot be saved \(No such file or directory\)"):
        plot_trace(trace, tmp_path / "none" / "t.png")
