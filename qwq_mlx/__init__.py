"""Convert QwQ-32B-Preview to 4-bit MLX weights, bounded and verified, and reason with it on one Mac.

    import qwq_mlx

    reasoner = qwq_mlx.load()  # or load("conversions/QwQ-32B-Preview-4bit")
    trace = reasoner.generate("How many r in strawberry.")
    print(trace.answer)

Importing this imports no model code and changes nothing in the process; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwq_mlx.convert.job import convert_checkpoint
    from qwq_mlx.convert.result import Conversion
    from qwq_mlx.errors import (
        BackendError,
        BatchError,
        ConversionError,
        DiskFullError,
        FitError,
        GenerationError,
        LoadError,
        NotFiniteError,
        OptionError,
        OutOfMemoryError,
        PromptError,
        QwqError,
        RankError,
        RecipeError,
        SavingError,
        SourceError,
        TemplateLimitError,
    )
    from qwq_mlx.generate.following import follow
    from qwq_mlx.generate.reasoner import Reasoner, load
    from qwq_mlx.generate.vote import Vote
    from qwq_mlx.generate.vote_plot import plot_vote
    from qwq_mlx.model.memory.plan import MemoryPlan, plan_memory
    from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
    from qwq_mlx.trace.plot import plot_trace
    from qwq_mlx.trace.trace import Step, Trace

__all__ = [
    "BackendError",
    "BatchError",
    "Conversion",
    "ConversionError",
    "DamagedModelError",
    "DiskFullError",
    "FitError",
    "GenerationError",
    "Inspect",
    "Limits",
    "LoadError",
    "MemoryPlan",
    "NotFiniteError",
    "OptionError",
    "OutOfMemoryError",
    "PromptError",
    "QwqError",
    "RankError",
    "Reasoner",
    "RecipeError",
    "Sampling",
    "SavingError",
    "SourceError",
    "Step",
    "TemplateLimitError",
    "Thinking",
    "Trace",
    "Vote",
    "convert_checkpoint",
    "follow",
    "load",
    "plan_memory",
    "plot_trace",
    "plot_vote",
]

__version__ = "0.1.0"

_HOMES = {
    "Conversion": "convert.result",
    "Inspect": "options",
    "Limits": "options",
    "MemoryPlan": "model.memory.plan",
    "Reasoner": "generate.reasoner",
    "Sampling": "options",
    "Step": "trace.trace",
    "Thinking": "options",
    "Trace": "trace.trace",
    "Vote": "generate.vote",
    "convert_checkpoint": "convert.job",
    "follow": "generate.following",
    "load": "generate.reasoner",
    "plan_memory": "model.memory.plan",
    "plot_trace": "trace.plot",
    "plot_vote": "generate.vote_plot",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
