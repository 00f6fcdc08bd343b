"""A vote as one picture: how many samples stood for each answer after so many tokens of each.

Does not: import matplotlib before it draws; it is the extra "plot".
"""

from __future__ import annotations

from pathlib import Path

from qwq_mlx.errors import OptionError
from qwq_mlx.generate.vote import Vote
from qwq_mlx.trace.plot import new_figure, save_figure

__all__ = ["plot_vote"]

_MAX_GROUPS = 8  # lines that can be told apart
_MAX_LABEL = 40  # characters of an answer


def plot_vote(vote: Vote, path: str | Path) -> None:
    """Draw the votes for each answer over the tokens of a sample into a .png, .pdf or .svg file.

    A line steps up where a sample with that answer ended; crosses on the axis are samples that were cut short.
    Raises OptionError for another kind of file, a missing matplotlib or a vote without answers; SavingError where the
    disk does not take it.

    >>> qwq_mlx.plot_vote(reasoner.vote("What is 3 + 4?", n=3, sampling=qwq_mlx.Sampling(seed=1)), "vote.svg")
    """
    if not vote.groups:
        raise OptionError("The vote has no answers, so there is nothing to draw.")
    figure = new_figure(path, width=9, height=4.5)
    axes = figure.subplots()
    lengths = [len(trace.ids) for trace in vote.traces]
    for group in vote.groups[:_MAX_GROUPS]:
        ends = sorted(lengths[place] for place in group.samples)
        counts = [0, *range(1, len(ends) + 1), len(ends)]
        label = f"{len(ends)}: {group.answer:.{_MAX_LABEL}}"
        axes.step([0, *ends, max(lengths)], counts, where="post", label=label)
    cut = [length for length, trace in zip(lengths, vote.traces, strict=True) if trace.finish_reason == "interrupted"]
    axes.plot(cut, [0] * len(cut), "x", color="#7f7f7f", label=f"{len(cut)} cut short" if cut else None)
    axes.set_xlabel("output tokens of a sample")
    axes.set_ylabel("samples")
    axes.set_title(
        f"{len(vote.traces)} of {vote.n} samples, agreement {vote.agreement:.0%}, "
        f"{vote.n_tokens_saved:,} tokens saved of {vote.n_tokens + vote.n_tokens_saved:,}",
        parse_math=False,
    )
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)
