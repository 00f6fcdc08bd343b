"""How outputs end: many ways to close a text, written by hand, none from a recorded output, each with its answer.

The beginning is the same for all, so what is found is found in the ending.
"""

from __future__ import annotations

import pytest
from splitting import split

from qwq_mlx.reasoning.answer import Splitter
from qwq_mlx.reasoning.profile import find_profile

ENGLISH = "Which planet is largest?\nA. Mars\nB. Venus\nC. Jupiter\nD. Earth\n"
IN_LINE = "Which planet is largest? (A) Mars (B) Venus (C) Jupiter (D) Earth"
CHINESE = "下列哪个是最大的行星?\nA. 火星\nB. 金星\nC. 木星\nD. 地球\n"
CHINESE_IN_LINE = "下列哪个是最大的行星?A、火星 B、金星 C、木星 D、地球"

STYLES: list[tuple[str, str | None, str | None]] = [  # ending, prompt, answer
    ("**Final Answer**\n\n\\[ \\boxed{\\dfrac{3}{4}} \\]\n", None, "\\dfrac{3}{4}"),
    ("**Final Answer**\n\n\\boxed{C}", ENGLISH, "C"),
    ("**Final Answer**\n\n**C**", ENGLISH, "C"),
    ("**Final Answer**\n\nC. Jupiter", ENGLISH, "C"),
    ("**Final Answer**\n\nThe answer is (C) Jupiter.", ENGLISH, "C"),
    ("**Final Answer:** 42", None, "42"),
    ("**Final Answer**: $\\frac{1}{2}$", None, "\\frac{1}{2}"),
    ("### Final Answer\n\n$$\\boxed{17}$$", None, "17"),
    ("**Answer:** \\(x = 3\\)", None, "x = 3"),
    ("**Conclusion**\n\nThe largest planet is Jupiter, so the answer is **C**.", ENGLISH, "C"),
    ("The answer is (C).", ENGLISH, "C"),
    ("So, the answer is C) Jupiter.", ENGLISH, "C"),
    ("Therefore, the correct option is (C).", IN_LINE, "C"),
    ("Therefore, option C is correct.", ENGLISH, "C"),
    ("Hence, the correct answer is option **C**: Jupiter.", ENGLISH, "C"),
    ("Answer: C", ENGLISH, "C"),
    ("I'll go with Jupiter.", ENGLISH, "C"),
    ("So the largest planet is Jupiter.", IN_LINE, "C"),
    ("<answer>\nC\n</answer>", "Put your answer in <answer> tags.", "C"),
    ("<ANSWER> 42 </ANSWER>", "Enclose the final result in <ANSWER></ANSWER>.", "42"),
    ("<answer>\\boxed{5}</answer>", "Put your answer in <answer> tags.", "5"),
    ('```json\n{\n  "answer": "C"\n}\n```', 'Answer with JSON: {"answer": "C"}', "C"),
    ('{"answer": "C"}', 'Answer with JSON: {"answer": "C"}', "C"),
    ('{"final_answer": 42}', None, "42"),
    (
        "Here is the function:\n\n```python\ndef f(x):\n    return x + 1\n```\n",
        "Write a Python function.",
        "def f(x):\n    return x + 1",
    ),
    (
        "**Final Code**\n\n```python\ndef f(x):\n    return x + 1\n```\n\nThis works because it adds one.",
        "Write a Python function.",
        "def f(x):\n    return x + 1",
    ),
    (
        "First:\n```python\nf = 1\n```\n\nWait. The corrected code:\n\n```python\ndef f(x):\n    return x + 1\n```\n",
        "Write a Python function.",
        "def f(x):\n    return x + 1",
    ),
    ("So \\boxed{5}.\n\nWait, I forgot a factor. It is \\boxed{10}.\n", None, "10"),
    ("So \\boxed{5}.\n\nWait, is that right? Yes, 2+3=5.\n\n**Final Answer**\n\n\\[ \\boxed{5} \\]", None, "5"),
    (
        "**Final Answer**\n\n\\[ \\boxed{5} \\]\n\nWait. 2+3 = 5. Yes.\n\n**Final Answer**\n\n\\[ \\boxed{5} \\]",
        None,
        "5",
    ),
    (
        "**Final Answer**\n\n\\[ \\boxed{5} \\]\n\nBut wait, it says 2+4.\n\n**Final Answer**\n\n\\[ \\boxed{6} \\]",
        None,
        "6",
    ),
    ("The solutions are \\(\\boxed{2}\\) and \\(\\boxed{-3}\\).", None, "2, -3"),
    ("The final answer is $\\boxed{\\text{(C)}}$. I hope it is correct.", None, "\\text{(C)}"),
    ("所以答案是 C。", CHINESE, "C"),
    ("因此,正确答案是C。", CHINESE, "C"),
    ("综上所述,选C。", CHINESE, "C"),
    ("故选:C.", CHINESE_IN_LINE, "C"),
    ("因此,最大的行星是木星。", CHINESE_IN_LINE, "C"),
    ("所以应该选择选项C。", CHINESE, "C"),
    ("**最终答案**\n\n\\[ \\boxed{42} \\]", None, "42"),
    ("**答案**\n\n42", None, "42"),
    ("最终答案:42", None, "42"),
    ("答案为 $\\frac{1}{2}$。", None, "\\frac{1}{2}"),
    ("所以,结果等于 42。", None, "42"),
    ("所以这个数是42。\n\n答:一共有42只鸡。", None, "42"),
    ("**结论**\n\n正确答案是 (C)。", CHINESE, "C"),
    ("So the answer is \\(\\frac{\\sqrt{3}}{2}\\).", None, "\\frac{\\sqrt{3}}{2}"),
    ("So our final answer is $x = 3$.", None, "x = 3"),
    ("Therefore, the final answer is:\n\n\\[ 42 \\]", None, "42"),
    ("Thus, the value of x is 7.", None, "7"),
    ("Therefore, there are 12 apples left.", None, "12 apples left"),
    ("The answer: **yes**, it converges.", None, "yes"),
    ("Final answer: D", None, "D"),
    ("ANSWER: B", None, "B"),
    ("The correct choice is B, because it is hotter.", ENGLISH, "B"),
    ("Among the given options, the best answer is D) Earth. However, C is also large.", ENGLISH, "D"),
    ("\\boxed{Jupiter}", ENGLISH, "Jupiter"),
    ("The answer is not A. The answer is B.", ENGLISH, "B"),
    ("**Solution:** The total is 15.\n\n**Answer:** 15", None, "15"),
    ("## Final Answer\n\nThe speed is **12 m/s**.", None, "12 m/s"),
    ("\\textbf{Final Answer}\n\n\\[\\boxed{9}\\]", None, "9"),
    (
        "**Final Answer**\n\n\\[ \\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}} \\]",
        None,
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    ),
    ("**Final Answer**\n\n\\[ \\fbox{8} \\]", None, "8"),
    ("$\\boxed{8", None, None),
    ("**Final Answer**\n\nThe area is 12.", None, "12"),
    ("(a) The rate is \\boxed{3}.\n\n(b) The time is \\boxed{8}.", None, "3, 8"),
    ("So in total, \\(2+3 = \\boxed{5}\\) apples.", None, "5"),
    ("Therefore, the smallest such number is \\(n = 12\\).", None, "n = 12"),
    ("Therefore, she has **12** apples.", None, "12"),
    ("In conclusion, the probability is $\\frac{1}{6}$.", None, "\\frac{1}{6}"),
    ("So the answer should be B, right? Yes, B.", ENGLISH, "B"),
    ("My final answer is: B", ENGLISH, "B"),
    ("I think the answer is D, but I'm not completely sure.", ENGLISH, "D"),
    ("Thus, **Option B** is the correct answer.", ENGLISH, "B"),
    ("Hence B is the correct answer.", ENGLISH, "B"),
    ("B is the correct option.", ENGLISH, "B"),
    ("So the correct answer is\n\nB", ENGLISH, "B"),
    ("The correct answer is B. Venus is wrong because it is small.", ENGLISH, "B"),
    ("Answer is B", ENGLISH, "B"),
    ("✅ **Answer: B**", ENGLISH, "B"),
    ("> **Answer:** 3 hours", None, "3 hours"),
    ("---\n\n**Final Answer:** \\( \\boxed{3} \\)", None, "3"),
    ("最终答案是:\n\n\\[ \\boxed{3} \\]", None, "3"),
    ("所以A和B都错,选择D。", CHINESE, "D"),
    ("因此,选项B是正确的。", CHINESE, "B"),
    ("所以x等于7。", None, "7"),
    ("### 最终答案\n\nC. 木星", CHINESE, "C"),
    (
        "**Final Answer**\n\nSo there are:\n\n\\[ \\boxed{120} \\]\n\nThis matches the pattern found above.",
        None,
        "120",
    ),
    (
        "Therefore, the angle is \\( 60^\\circ \\), and the final answer is \\( \\boxed{60^\\circ} \\).",
        None,
        "60^\\circ",
    ),
    ("### Answer: $x \\in (2, 3]$", None, "x \\in (2, 3]"),
    ("**Final Answer**\n\n(1) 3\n(2) 5", None, "(1) 3\n(2) 5"),
    (
        "The correct answer is **D. All of the above**",
        "Pick one.\nA. One\nB. Two\nC. Three\nD. All of the above\n",
        "D",
    ),
    ("Based on the analysis, I would choose option B.", ENGLISH, "B"),
    ("So I choose (D).", ENGLISH, "D"),
    ("So, it's C.", ENGLISH, "C"),
    ("This leaves Jupiter as the largest planet.", ENGLISH, "C"),
    ("Therefore, the answer is $C$.", ENGLISH, "C"),
    ("Therefore, the answer is \\(\\boxed{\\textbf{(C)}}\\).", ENGLISH, "\\textbf{(C)}"),
    ("The final answer is 3/4.", None, "3/4"),
    ("The answer is 3.5 kg.", None, "3.5 kg"),
    ("The answer is approximately 3.14.", None, "3.14"),
    ("Answer:\n\n```\n42\n```", None, "42"),
    ("[ANSWER]\nB\n[/ANSWER]", "Put your answer between [ANSWER] and [/ANSWER].", "B"),
    ("<final_answer>12</final_answer>", "Write the answer inside <final_answer></final_answer>.", "12"),
    ('{"reasoning": "sum", "answer": 7}', "Reply in JSON with an answer field.", "7"),
    ("Final Answer: The final answer is $42$. I hope it is correct.", None, "42"),
    ("#### 42", None, "42"),
    ("Yes, the statement is true.", None, None),
    ("So the final answer is **True**.", None, "True"),
    ('The answer is "sententia".', None, "sententia"),
    ("因此答案是B、金星。", CHINESE, "B"),
    ("正确选项为D。", CHINESE, "D"),
    ("本题选B。", CHINESE, "B"),
    ("因此,$x = 3$ 是方程的解,答案为 $\\boxed{3}$。", None, "3"),
    ("答案应为 B。", CHINESE, "B"),
    ("最后的答案就是12。", None, "12"),
    (
        "Let me verify... yes.\n\nSo it is $\\boxed{7}$. Wait, but what about 8? No, 8 doesn't work.",
        None,
        "7",
    ),
    ("So the total is 3 + 4 = 7.", None, "7"),
    ("Answer = 12", None, "12"),
    ("Hence proved.", None, None),
]


@pytest.mark.parametrize(("ending", "prompt", "answer"), STYLES)
def test_the_answer_is_found_however_the_text_ends(ending: str, prompt: str | None, answer: str | None) -> None:
    found = split("Let me think about it. First I look at the terms.\n\n" + ending, prompt=prompt)
    assert found.answer == answer
    assert found.conclusion is not None
    assert found.confidence < 0.2 if answer is None else found.confidence >= 0.5


CUT = [
    "So the answer is 5",
    "**Final Answer**\n\n\\[ \\boxed{12",
    "Here is code:\n\n```python\nprint(1)\n```\n",
    "Therefore, option",
    "所以答案是 4",
    "Thus, the value of x is 7.",
]


@pytest.mark.parametrize("ending", CUT)
def test_nothing_is_guessed_from_where_a_text_was_cut(ending: str) -> None:
    splitter = Splitter(find_profile("qwq-preview"), prompt="How many?")
    splitter.feed("Let me think.\n\n" + ending)
    found = splitter.finish(is_ended=False)
    assert found.answer is None
    assert found.confidence < 0.2


@pytest.mark.parametrize("doubt", ["Wait, is that right?", "Hmm, but 7 is odd.", "Hold on.", "等等,不对。"])
def test_a_final_answer_that_is_doubted_afterwards_is_kept_and_less_sure(doubt: str) -> None:
    sure, doubted = (Splitter(find_profile("qwq-preview")) for _ in range(2))
    text = "**Final Answer**\n\n\\[ \\boxed{7} \\]\n"
    sure.feed(text)
    doubted.feed(f"{text}\n{doubt}\n")
    found = doubted.finish()
    assert (found.answer, found.is_revised) == ("7", True)
    assert found.confidence < sure.finish().confidence


def test_code_is_no_answer_where_nobody_asked_for_code() -> None:
    text = "I check it by program.\n\n```python\nprint(2 + 2)\n```\n\nIt prints four."
    splitter = Splitter(find_profile("qwq-preview"), prompt="What is 2 + 2?")
    splitter.feed(text)
    assert splitter.finish().answer is None
