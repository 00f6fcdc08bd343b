"""lm-eval's model class, beside a stand-in for lm-eval, whose own 200 packages are not installed for the tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qwq_mlx.errors import OptionError
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.options import Limits, Sampling
from qwq_mlx.pocket import FOLDER as POCKET

pytestmark = pytest.mark.pocket


@pytest.fixture(scope="module")
def lm_eval_module() -> Iterator[ModuleType]:
    class LM:
        def __init__(self) -> None:
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    names = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda kind: kind},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in names.items():
            stub = ModuleType(name)
            vars(stub).update(values)
            patch.setitem(sys.modules, name, stub)
        yield importlib.import_module("qwq_mlx.evaluate.lm_eval")
        del sys.modules["qwq_mlx.evaluate.lm_eval"]


@pytest.fixture(scope="module")
def model(lm_eval_module: ModuleType) -> Any:
    return lm_eval_module.QwqMlxLM(pretrained=str(POCKET), max_tokens=40, batch_size="4", device=None)


def request(context: str, **settings: Any) -> Any:
    return SimpleNamespace(args=(context, settings))


def test_requests_are_answered_as_the_reasoner_answers_them(model: Any) -> None:
    sums, messages = "What is 3 + 4?", [{"role": "user", "content": "What is 12 + 30?"}]
    chat = model.apply_chat_template(messages)
    texts = model.generate_until(
        [
            request(sums, until=["\n\n\n"], do_sample=False, temperature=0.9),
            request(chat, do_sample=True, temperature=0.7, top_k=20, max_gen_toks=60),
            request(chat, until="Final", do_sample=False),
            request(sums, do_sample=False, max_gen_toks=3),
        ],
        disable_tqdm=True,
    )
    greedy = model._reasoner.generate(sums, sampling=Sampling(temperature=0))
    drawn = model._reasoner.generate(
        messages, sampling=Sampling(temperature=0.7, top_k=20, seed=question_seed(0, 1)), limits=Limits(max_tokens=60)
    )
    assert texts[0] == greedy.conclusion and "\\boxed{7}" in texts[0] and "7" in greedy.thinking
    assert texts[1] == drawn.conclusion
    assert texts[2] == "" or "Final" not in texts[2]
    assert texts[3] == "", "a text that was cut is no answer"


def test_stop_texts_are_looked_for_in_the_answer_alone(lm_eval_module: ModuleType) -> None:
    def trace(thinking: str, conclusion: str, finish_reason: str = "stop") -> Any:
        return SimpleNamespace(
            text=thinking + conclusion, conclusion=conclusion, finish_reason=finish_reason, injections=(), answer="4"
        )

    returned = lm_eval_module.returned_text
    assert returned(trace("Q: what is asked? ", "It is 4.\nQ: next"), ["Q:"]) == "It is 4.\n"
    assert returned(trace("Q: what is asked? ", "It is 4."), ["Q:", ""]) == "It is 4."
    assert returned(trace("It is 4. Q: next", ""), ["Q:"]) == "It is 4. "
    assert returned(trace("So far 3", "", "length"), []) == returned(trace("3 3 3", "", "loop"), []) == ""


def test_what_cannot_be_done_is_refused_by_name(model: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"no log-likelihoods.*gsm8k"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="no log-likelihoods"):
        model.loglikelihood_rolling([])
    with pytest.raises(OptionError, match="gen_prefix"):
        model.apply_chat_template([], add_generation_prompt=False)
    with pytest.raises(OptionError, match=r"asks for num_beams=4, expected some of do_sample, max_gen_toks"):
        model.generate_until([request("x", num_beams=4)], disable_tqdm=True)
    assert model.tokenizer_name == "checkpoint" and "im_start" in model.chat_template()
