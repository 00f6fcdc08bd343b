"""The door of reading answers: thinking and answer told apart, the answer found, and answers compared.

Other rooms import from here only.

>>> from qwq_mlx.reasoning.profile import find_profile
>>> extract("I add them.\\n\\n**Final Answer**\\n\\n\\\\[ \\\\boxed{\\\\frac{1}{2}} \\\\]", find_profile("qwq-preview"))
'\\\\frac{1}{2}'
>>> compare("\\\\frac{1}{2}", "0.5")
True
"""

from qwq_mlx.reasoning.answer.cues import MAX_LINE, doubts
from qwq_mlx.reasoning.answer.equivalence import compare, normalise
from qwq_mlx.reasoning.answer.expression import Formula, NotAFormula, is_same_value
from qwq_mlx.reasoning.answer.math_verify import has_math_verify, math_verify_texts
from qwq_mlx.reasoning.answer.rule import SURE
from qwq_mlx.reasoning.answer.rules import stated
from qwq_mlx.reasoning.answer.split import Kind, Segment, Split
from qwq_mlx.reasoning.answer.splitter import Splitter, extract

__all__ = [
    "MAX_LINE",
    "SURE",
    "Formula",
    "Kind",
    "NotAFormula",
    "Segment",
    "Split",
    "Splitter",
    "compare",
    "doubts",
    "extract",
    "has_math_verify",
    "is_same_value",
    "math_verify_texts",
    "normalise",
    "stated",
]
