"""One question by every interface, as the scripts that load a server ask it: the same thinking and answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from serving import QUESTION, Served

from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.options import Sampling

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from interfaces import INTERFACES, RUNS, Question, asked, told

pytestmark = pytest.mark.pocket


@pytest.mark.parametrize("penalty", [None, 1.2])
def test_every_interface_gives_the_text_of_the_engine(
    pocket_server: Served, pocket_reasoner: Reasoner, penalty: float | None
) -> None:
    question = Question(QUESTION, 200, None if penalty is None else 5, penalty)
    sampling = Sampling(seed=question.seed, temperature=1.0 if penalty else 0.0, repetition_penalty=penalty)
    trace = pocket_reasoner.generate(QUESTION, sampling=sampling)
    names = [interface for interface in INTERFACES if question.has(interface)]
    assert len(names) == (7 if penalty is None else 5)
    for interface in names:
        status, _, raw = pocket_server.send("POST", *asked(interface, "pocket", question))
        assert status in (200, 201), raw
        if interface == "run":
            _, _, raw = pocket_server.send("GET", f"{RUNS}/{json.loads(raw)['id']}/steps")
        thinking, answer = told(interface, raw)
        assert answer == (trace.text if interface == "run" else trace.conclusion), interface
        assert thinking in (None, trace.thinking), interface
