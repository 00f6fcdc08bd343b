"""The door of finding loops: exact cycles, near repeats, one answer stated again and again, doubt without news.

Other rooms import from here only.

>>> detector = LoopDetector()
>>> loops = [detector.feed(7, " ha") for _ in range(60)]
>>> next(loop.evidence for loop in loops if loop)
'the last 51 tokens repeat every 1, 51.0 times'
"""

from qwq_mlx.reasoning.loops.detector import Loop, LoopDetector, LoopOptions, LoopScores

__all__ = ["Loop", "LoopDetector", "LoopOptions", "LoopScores"]
