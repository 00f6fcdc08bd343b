"""Tails of outputs as QwQ writes them, and what a careful reader takes for the answer.

Written by hand, for forms that the recorded outputs seldom have: units, intervals, tuples, mixed numbers, lists,
letters, tags, JSON, code, Chinese, none.

`compare` judges, as a reader would.
"""

from __future__ import annotations

import pytest
from splitting import split

from qwq_mlx.reasoning.answer import compare

START = "Let's see. I need to think about this carefully.\n\nFirst, I'll set up what is given.\n\n"
END = "**Final Answer**\n\n"
MC = "Which one is right?\n(A) 1/2\n(B) 1/3\n(C) 2/3\n(D) 3/4\n"
MCT = "Which organelle makes ATP?\nA. Nucleus\nB. Mitochondrion\nC. Ribosome\nD. Golgi apparatus\n"
J = 'Reply with a JSON object with the keys "reasoning" and "answer".'
ABCD = "Select all that apply.\n(A) 2\n(B) 4\n(C) 5\n(D) 9\n"
NUM = (
    "What is Evelyn's relationship to Samuel?\n1. Evelyn is Samuel's parent.\n2. Evelyn is Samuel's aunt.\n"
    "3. Evelyn is Samuel's cousin.\nEnclose the selected answer number in the <ANSWER> tag, for example: "
    "<ANSWER>1</ANSWER>."
)

LONG = (
    "The farmer first takes the goat across and returns alone. Then he takes the wolf across and brings the goat back. "
    "After that he takes the cabbage across, returns alone, and finally takes the goat across, so that "
    "nothing is eaten."
)
G = (
    "A ball is dropped. Which statement is true?\nA) Its kinetic energy decreases.\n"
    "B) Its potential energy increases.\n"
    "C) Its mechanical energy is conserved.\nD) Its mass changes.\nAnswer with the letter only."
)

TAILS: list[tuple[str, str | None, str | None]] = [  # tail, prompt, answer
    # boxes
    (END + "\\[ \\boxed{25\\%} \\]", None, "25%"),
    (END + "\\[ \\boxed{\\$18.90} \\]", None, "18.90"),
    (END + "\\[ \\boxed{3\\frac{1}{2}} \\]", None, "7/2"),
    (END + "\\[ \\boxed{45^\\circ} \\]", None, "45"),
    (END + "\\[ \\boxed{12 \\text{ cm}^2} \\]", None, "12"),
    (END + "\\[ \\boxed{(-\\infty, 2] \\cup [5, \\infty)} \\]", None, "(-\\infty,2]\\cup[5,\\infty)"),
    (END + "\\[ \\boxed{\\left( 3, \\dfrac{\\pi}{2} \\right)} \\]", None, "(3, \\frac{\\pi}{2})"),
    (
        END + "\\[\n\\boxed{\n\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}\n}\n\\]",
        None,
        "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    ),
    (END + "\\[ \\boxed{y = 2x - 3} \\]", None, "y=2x-3"),
    (END + "\\[ \\boxed{x = 3} \\]", None, "3"),
    (END + "\\[ \\boxed{1{,}024} \\]", None, "1024"),
    (END + "\\[ \\boxed{10{,}000 \\text{ dollars}} \\]", None, "10000"),
    (END + "\\[ \\boxed{\\text{(B)}} \\]", MC, "B"),
    (END + "\\[ \\boxed{\\text{B. Mitochondrion}} \\]", MCT, "B"),
    (END + "\\[ \\boxed{\\textbf{(C) } \\frac{2}{3}} \\]", MC, "C"),
    (END + "\\[ \\boxed{2, 3, 5} \\]", None, "5, 2, 3"),
    (END + "\\[ \\boxed{\\{1, 4\\}} \\]", None, "\\{4,1\\}"),
    (END + "\\[ \\boxed{-2 \\pm \\sqrt{7}} \\]", None, "-2+\\sqrt7, -2-\\sqrt7"),
    (END + "\\boxed{2} and \\boxed{-3}", None, "-3, 2"),
    (END + "\\[ \\boxed{x=1} \\quad \\text{and} \\quad \\boxed{y=2} \\]", None, "x=1, y=2"),
    (END + "The possible values of \\( k \\) are \\( \\boxed{3} \\) and \\( \\boxed{7} \\).", None, "3, 7"),
    (END + "The smallest value is \\( \\boxed{3} \\).", None, "3"),
    (
        "So it seems that the answer is \\boxed{12}.\n\n"
        "Wait, but I should double-check. For n=5, I get 13 actually because the endpoints count too.\n\n"
        "So the answer should be 13.\n\n" + END + "\\[ \\boxed{13} \\]",
        None,
        "13",
    ),
    (
        "So it seems that the answer is \\boxed{12}.\n\nWait, but the endpoints count too, so it's \\boxed{13}.",
        None,
        "13",
    ),
    ("So the area is \\boxed{24}.\n\nWait a second, the height is 5, not 4, so the area should be 30.", None, "30"),
    ("So the area is \\(\\boxed{24}\\).\n\nTo double-check, 6 times 4 is 24, and that makes sense.", None, "24"),
    (
        "Therefore, the probability is \\( \\frac{1}{6} \\), which is approximately 0.1667.\n\n"
        + END
        + "\\[ \\boxed{\\dfrac{1}{6}} \\]",
        None,
        "1/6",
    ),
    # heading with plain text
    ("**Final Answer:** The sum is 15.", None, "15"),
    ("**Final Answer:**\n\nThe sum is **15**.", None, "15"),
    ("**Final Answer:**\n\n15 marbles", None, "15 marbles"),
    ("**Final Answer**\n\n- Alice: 3\n- Bob: 5\n- Carol: 7", None, "- Alice: 3\n- Bob: 5\n- Carol: 7"),
    ("**Final Answer:**\n\n1. Red\n2. Blue\n3. Green", None, "1. Red\n2. Blue\n3. Green"),
    ("**Final Answer:** (D)", MC, "D"),
    ("**Final Answer: (D) 3/4**", MC, "D"),
    ("**Final Answer: B**", MCT, "B"),
    ("## Final Answer\n\nThe correct answer is **B. Mitochondrion**.", MCT, "B"),
    ("**Final Answer**\n\nMitochondrion", MCT, "B"),
    ("**Final Answer**\n\nYes, the graph is bipartite.", "Is the graph bipartite?", "Yes"),
    ("**Final Answer**\n\n\\[\n\\frac{7}{12}\n\\]", None, "7/12"),
    ("**Final Answer**\n\n$x = \\frac{-1+\\sqrt{5}}{2}$", None, "\\frac{\\sqrt5-1}{2}"),
    ("**Final Answer**\n\n`42`", None, "42"),
    ("**Final Answer**\n\n```\n42\n```", None, "42"),
    ("**Answer**\n\n\\[ \\boxed{8} \\]", None, "8"),
    ("**Final Result**\n\nThe integral evaluates to $\\ln 2$.", None, "\\ln 2"),
    ("**Final Solution**\n\n$\\boxed{6}$", None, "6"),
    ("Final Answer: 9", None, "9"),
    ("Final answer: The value of x is 9.", None, "9"),
    ("The final answer is $9$. I hope it is correct.", None, "9"),
    ("Therefore, the final answer is: $\\boxed{9}$. I hope it is correct.", None, "9"),
    ("The answer is:\n\n\\[ 3\\sqrt{2} \\]", None, "3\\sqrt2"),
    ("The answer is: \\[ \\frac{5}{9} \\]", None, "5/9"),
    ("So the answer is\n\n$$\\frac{5}{9}.$$", None, "5/9"),
    ("Thus, the answer is $\\frac{5}{9}$.", None, "5/9"),
    ("Therefore, the number of ways is\n\n\\[ 6! = 720 \\]", None, "720"),
    ("Therefore, the remainder when \\(2^{100}\\) is divided by 7 is 2.", None, "2"),
    ("Hence, Tom has 14 apples left.", None, "14"),
    ("So, the train arrives at 5:45 PM.", None, "5:45 PM"),
    ("So, in total, she spends $84 per week.", None, "$84"),
    ("So, the total cost is $\\$36.50$.", None, "36.50"),
    ("So, the discount is 20%.", None, "20%"),
    ("So the angle is \\(60^\\circ\\).", None, "60"),
    # multiple choice sentences
    ("So, the correct choice is B.", MCT, "B"),
    ("Therefore, the answer should be B, Mitochondrion.", MCT, "B"),
    ("So, among the options, Mitochondrion is the correct one.", MCT, "B"),
    ("Thus, the answer is C.", MC, "C"),
    ("So I'm going with (C).", MC, "C"),
    ("So, I think option (C) is the best choice.", MC, "C"),
    ("Since options A, B and D are wrong, the answer must be C.", MC, "C"),
    ("The answer is 2/3, which corresponds to option (C).", MC, "C"),
    ("The probability is 2/3, which is option (C).", MC, "C"),
    ("So the probability is \\(\\frac{2}{3}\\).\n\nLooking at the options, that is (C).", MC, "C"),
    ("\\[ \\boxed{C} \\]", MC, "C"),
    # Chinese
    ("最终答案\n\n\\[ \\boxed{36} \\]", "小明有多少个苹果?", "36"),
    ("**最终答案**\n\n\\[ \\boxed{36} \\]", "小明有多少个苹果?", "36"),
    ("**最终答案：** 36个", "小明有多少个苹果?", "36"),
    ("所以,答案是36。", "小明有多少个苹果?", "36"),
    ("因此,最终答案是 \\(\\boxed{36}\\)。", "小明有多少个苹果?", "36"),
    ("因此,小明一共有36个苹果。", "小明有多少个苹果?", "36"),
    ("综上所述,正确答案是B。", "哪个细胞器产生ATP?\nA. 细胞核\nB. 线粒体\nC. 核糖体", "B"),
    ("所以选B。", "哪个细胞器产生ATP?\nA. 细胞核\nB. 线粒体\nC. 核糖体", "B"),
    ("故答案为：B", "哪个细胞器产生ATP?\nA. 细胞核\nB. 线粒体\nC. 核糖体", "B"),
    ("所以，答案是 $\\frac{3}{4}$。", "概率是多少？", "3/4"),
    ("答：小明有36个苹果。", "小明有多少个苹果?", "36"),
    ("**答案**\n\n36", "小明有多少个苹果?", "36"),
    ("因此，x 的值为 5。", "x 的值是多少？", "5"),
    ("所以选项 B 是正确的。", "哪个细胞器产生ATP?\nA. 细胞核\nB. 线粒体\nC. 核糖体", "B"),
    # code
    (
        "Here's the complete solution:\n\n```python\ndef add(a, b):\n    return a + b\n```",
        "Write a function add(a, b).",
        "def add(a, b):\n    return a + b",
    ),
    (
        END + "```python\ndef add(a, b):\n    return a + b\n```",
        "Write a function add(a, b).",
        "def add(a, b):\n    return a + b",
    ),
    (
        "**Final Solution**\n\n```python\ndef add(a, b):\n    return a + b\n```\n\n**Explanation**\n\nIt adds.",
        "Write a function add(a, b).",
        "def add(a, b):\n    return a + b",
    ),
    (
        "```python\ndef add(a, b):\n    return a + b\n```\n\nLet me test it:\n\n```python\n"
        "print(add(1, 2))\n```\n\nThis prints 3, as expected.",
        "Write a function add(a, b).",
        "def add(a, b):\n    return a + b",
    ),
    (
        "```python\ndef add(a, b):\n    return a + b\n```\n\nYou can use it like this:\n\n```python\n"
        "print(add(1, 2))\n```",
        "Write a function add(a, b).",
        "def add(a, b):\n    return a + b",
    ),
    (
        "```sql\nSELECT name FROM users WHERE age > 30;\n```",
        "Write an SQL query.",
        "SELECT name FROM users WHERE age > 30;",
    ),
    # tags and JSON
    ("Therefore, <ANSWER>3</ANSWER>", "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.", "3"),
    (
        "Therefore, the answer is:\n\n<ANSWER>\n3\n</ANSWER>\n",
        "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.",
        "3",
    ),
    (
        "So <ANSWER>1</ANSWER>? Hmm, no.\n\nActually it's the third one.\n\n<ANSWER>3</ANSWER>",
        "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.",
        "3",
    ),
    (END + "<ANSWER>3</ANSWER>", "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.", "3"),
    (END + "\\[ \\boxed{3} \\]", "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.", "3"),
    ("<ANSWER>3", "Put the number in the <ANSWER> tag, e.g. <ANSWER>1</ANSWER>.", "3"),
    ('```json\n{"reasoning": "It is twice 21.", "answer": 42}\n```', J, "42"),
    ('{"reasoning": "It is twice 21.", "answer": "42"}', J, "42"),
    (END + '```json\n{\n  "reasoning": "It is twice 21.",\n  "answer": 42\n}\n```', J, "42"),
    ('{"answer": [1, 2]}', J, "[1, 2]"),
    # none
    ("I can't determine the answer without more information about the initial speed.", None, None),
    ("Hmm, this is getting complicated. Maybe I should try a different approach.", None, None),
    ("Let me know if you have further questions!", None, None),
    ("In conclusion, both perspectives have merit and the choice depends on one's values.", None, None),
    ("Wait, maybe I should consider the case where n is even.", None, None),
    (END + "\\[ \\boxed{2^{10} - 1} \\]", None, "1023"),
    (END + "\\[ \\boxed{1.5 \\times 10^{-3}} \\]", None, "0.0015"),
    (END + "\\[ \\boxed{\\approx 3.14} \\]", None, "3.14"),
    (END + "\\[ \\boxed{12\\ \\text{square units}} \\]", None, "12"),
    (END + "\\[ \\boxed{0.\\overline{3}} \\]", None, "1/3"),
    (END + "\\[ \\boxed{\\text{A, C}} \\]", ABCD, "A, C"),
    (END + "\\[ \\boxed{\\text{A and C}} \\]", ABCD, "C, A"),
    (END + "\\[ \\boxed{x \\in [1, 3)} \\]", None, "[1,3)"),
    (END + "\\[ \\boxed{\\sqrt{2}/2} \\]", None, "\\frac{\\sqrt{2}}{2}"),
    (END + "\\[ \\boxed{5:3} \\]", None, "5:3"),
    (END + "\\[ \\boxed{€5} \\]", None, "5"),
    (END + "\\[ \\boxed{7{:}30 \\text{ PM}} \\]", None, "7:30 PM"),
    (END + "\\[ \\boxed{\\text{Friday}} \\]", None, "Friday"),
    (END + "\\[ \\boxed{\\text{No solution}} \\]", None, "no solution"),
    (END + "\\[ \\boxed{\\varnothing} \\]", None, "\\emptyset"),
    (END + "\\[ \\boxed{-\\dfrac{1}{2}} \\]", None, "-0.5"),
    (END + "\\[ \\boxed{\\tfrac12} \\]", None, "0.5"),
    (END + "\\[ \\boxed{f(x) = x^2 + 1} \\]", None, "x^2+1"),
    (END + "\\[ \\boxed{(x - 2)(x + 3)} \\]", None, "x^2+x-6"),
    (END + "\\[ \\boxed{\\dfrac{\\pi^2}{6}} \\]", None, "\\frac{\\pi^2}{6}"),
    (END + "\\[ \\boxed{3\\,\\text{m/s}} \\]", None, "3 m/s"),
    (END + "\\[ \\boxed{9.8\\ \\mathrm{m/s^2}} \\]", None, "9.8"),
    (END + "\\[ \\boxed{1\\,234\\,567} \\]", None, "1234567"),
    (END + "\\[ \\boxed{x = 2 \\text{ or } x = -5} \\]", None, "2, -5"),
    (END + "\\[ \\boxed{x = 2, y = 3} \\]", None, "x=2, y=3"),
    (END + "\\[ \\boxed{(x, y) = (2, 3)} \\]", None, "(2,3)"),
    (
        END + "\\[ \\boxed{\\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}} \\]",
        None,
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    ),
    (END + "\\[ \\boxed{\\text{Yes}} \\]", "Is it prime?", "yes"),
    (END + "\\[ \\boxed{\\text{True}} \\]", "True or false?", "True"),
    (END + "\\[ \\boxed{100_2} \\]", None, "100_2"),
    ("Thus $a+b+c = 12+5+3 = \\boxed{20}$.", None, "20"),
    ("$$\\boxed{\\frac{3}{8}}.$$", None, "3/8"),
    (
        "So the answer is either 3 or 5.\n\nBut since n must be even... wait, 3 and 5 are odd.\n\n"
        "So n must be 4.\n\nTherefore, the answer is 4.",
        None,
        "4",
    ),
    ("The answer is not 5 but 6.", None, "6"),
    ("So the answer is A and C.", ABCD, "A, C"),
    ("Therefore, the correct options are (A) and (C).", ABCD, "A, C"),
    ("So both (A) and (C) are correct.\n\n" + END + "\\[ \\boxed{A, C} \\]", ABCD, "A, C"),
    (
        "So the answer is A.\n\nJust to be sure, let me check B: 4 is even, and so it isn't prime.\n\nYes, A it is.",
        ABCD,
        "A",
    ),
    ("So, my final answer is that Evelyn is Samuel's parent.", NUM, "1"),
    ("Therefore, the correct answer is 1. Evelyn is Samuel's parent.", NUM, "1"),
    ("So, the answer is <ANSWER>1</ANSWER>, because Evelyn is Samuel's parent.", NUM, "1"),
    ("So, the correct answer is option 1.\n\n**Final Answer**\n\n<ANSWER>1</ANSWER>", NUM, "1"),
    ("**Final Answer**\n\n\\[ \\boxed{1} \\]\n\n<ANSWER>1</ANSWER>", NUM, "1"),
    ("**Final Answer**\n\n\\[ \\text{<ANSWER>1</ANSWER>} \\]", NUM, "1"),
    ("**Final Answer**\n\n\\[ \\boxed{\\text{<ANSWER>1</ANSWER>}} \\]", NUM, "1"),
    ("<answer>Evelyn is Samuel's parent.</answer>", NUM, "Evelyn is Samuel's parent"),
    (
        "**Final Answer**\n\n\\[ \\boxed{8} \\]\n\nWait, I should double-check the case n=2.\n\n"
        "For n=2 there is one more, so it should be 9.\n\n**Final Answer**\n\n\\[ \\boxed{9} \\]",
        None,
        "9",
    ),
    (
        "**Final Answer**\n\n\\[ \\boxed{8} \\]\n\nNote: if zero counts as natural, it would be \\(\\boxed{9}\\).",
        None,
        "8",
    ),
    (
        "**Final Answer**\n\nThe dimensions are 3 cm by 4 cm, so the area is \\(\\boxed{12}\\) square centimeters.",
        None,
        "12",
    ),
    ("**Final Answer**\n\n(a) \\(\\boxed{3}\\)\n\n(b) \\(\\boxed{5}\\)", "Find (a) the mode (b) the mean", "3, 5"),
    ("**Final Answer**\n\nPart 1: \\(\\boxed{3}\\)\n\nPart 2: \\(\\boxed{5}\\)", "Part 1. ... Part 2. ...", "3, 5"),
    ("**Final Answer**\n\n\\[ \\boxed{3} \\text{ apples and } \\boxed{4} \\text{ pears} \\]", None, "3, 4"),
    ("Thus, \\( m = 4 \\) and \\( n = 7 \\).\n\nSo \\( m + n = 11 \\).", None, "11"),
    ("So the equation of the line is \\( y = 2x + 1 \\).", None, "y = 2x+1"),
    ("So, the two numbers are 12 and 15.", None, "12, 15"),
    ("Therefore, the capital of Australia is Canberra.", None, "Canberra"),
    ('So, the word spelled backwards is "olleh".', None, "olleh"),
    ("So the 'r' appears 3 times in \"strawberry\".", None, "3"),
    ("So there are three r's in strawberry.", None, "three"),
    ("So 9.9 is larger than 9.11.", "Which is larger, 9.11 or 9.9?", "9.9"),
    ("Therefore, 9.9 is the larger number.", "Which is larger, 9.11 or 9.9?", "9.9"),
    ("因此,最终答案是:\n\n\\[ \\boxed{\\frac{3}{4}} \\]", "概率是多少?", "3/4"),
    ("**最终答案:**\n\n\\[ \\boxed{B} \\]", "哪个?\nA. 甲\nB. 乙\nC. 丙", "B"),
    ("因此,正确选项是 (B)。", "哪个?\nA. 甲\nB. 乙\nC. 丙", "B"),
    ("所以这个三角形的面积是12平方厘米。", "三角形的面积是多少?", "12"),
    ("答案应该是12。", "是多少?", "12"),
    ("所以 $x=3$。", "解方程。", "3"),
    ("综上,方程的解为 $x=2$ 或 $x=3$。", "解方程。", "2, 3"),
    (END + LONG, "How does the farmer cross the river?", LONG),
    (END + "1. \\(\\boxed{12}\\)\n\n2. \\(\\boxed{15}\\)", "1. ... 2. ...", "12, 15"),
    (END + "$$\\boxed{A}$$", G, "A"),
    (END + "C) Its mechanical energy is conserved.", G, "C"),
    ("Therefore, the correct answer is:\n\nC) Its mechanical energy is conserved.", G, "C"),
    ("Therefore, the correct answer is:\n\n**C) Its mechanical energy is conserved.**", G, "C"),
    ("So, the correct statement is that its mechanical energy is conserved.\n\nC", G, "C"),
    ("Answer: C) Its mechanical energy is conserved.", G, "C"),
    ("**C**", G, "C"),
    ("C", G, "C"),
    ("The answer is C because only gravity acts.", G, "C"),
    ("So C is correct.", G, "C"),
    ("So the only one that holds is statement C.", G, "C"),
    ("Thus, A, B, and D are incorrect, and C is the right answer.", G, "C"),
    ("So, none of the options A, B or D fit, which leaves C.", G, "C"),
    ("Based on this analysis, the best answer is C.", G, "C"),
    ("I'm pretty confident that it's C.", G, "C"),
    ("Thus, the sum of all possible values is $3 + 7 = 10$.", None, "10"),
    ("Therefore, the final answer is $\\boxed{10}$ square meters.", None, "10"),
    (
        "So, \\( f(3) = 10 \\).\n\n" + END + "\\[ \\boxed{10} \\]\n\n"
        "Let me verify that again with another method.\n\n"
        "Using the recursion, \\( f(3) = 2 \\cdot 4 + 2 = 10 \\). Yes.",
        None,
        "10",
    ),
    (
        END + "\\[ \\boxed{10} \\]\n\nBut wait, maybe I should consider negative values.\n\n"
        "If x is negative, the result is the same. So the answer remains 10.",
        None,
        "10",
    ),
    (
        END + "\\[ \\boxed{10} \\]\n\nHmm, actually, I think I made an error. It should be 12.\n\n"
        "" + END + "\\[ \\boxed{12} \\]",
        None,
        "12",
    ),
    (END + "The probability is \\(\\frac{3}{10}\\) or 30%.", None, "3/10"),
    (END + "The answer is 5 hours and 30 minutes.", None, "5 hours and 30 minutes"),
    (END + "\\[ \\boxed{5 \\text{ hours } 30 \\text{ minutes}} \\]", None, "5 \\text{ hours } 30 \\text{ minutes}"),
    (END + "\\[ \\boxed{\\frac{17}{50}} \\approx 0.34 \\]", None, "17/50"),
    (END + "\\[ x = \\boxed{-3} \\]", None, "-3"),
    (END + "\\[ \\boxed{\\text{The answer is } 42} \\]", None, "42"),
    (END + "\\[ \\boxed{\\text{Answer: } 42} \\]", None, "42"),
    (END + "\\[ \\boxed{\\textbf{42}} \\]", None, "42"),
    (END + "\\[ \\boxed{\\mathbf{42}} \\]", None, "42"),
    (END + "\\[ \\boxed{42.} \\]", None, "42"),
    (END + "\\[ \\boxed{42.0} \\]", None, "42"),
    (END + "\\[ \\fbox{42} \\]", None, "42"),
    (END + "\\(\\boxed{42}\\)", None, "42"),
    (END + "\\boxed 42", None, "42"),
    (END + "**42**", None, "42"),
    (END + "42", None, "42"),
    (END + "\\$42", None, "42"),
    (END + "≈ 3.7 km", None, "3.7 km"),
    (END + "x = 2 and y = 5", None, "x=2, y=5"),
    (
        END + "\\[\n\\begin{cases}\nx = 2 \\\\\ny = 5\n\\end{cases}\n\\]",
        None,
        "\\begin{cases} x=2 \\\\ y=5 \\end{cases}",
    ),
    (END + "\\[ \\boxed{\\begin{aligned} x &= 2 \\\\ y &= 5 \\end{aligned}} \\]", None, "x=2, y=5"),
    (END + "The function is increasing on \\((2, \\infty)\\).", None, "(2,\\infty)"),
    (END + "There are no real solutions.", None, "There are no real solutions"),
    (END + "No.", "Is 91 prime?", "No"),
    ("So, yes, 97 is prime.", "Is 97 prime?", "yes"),
    ("Therefore, 91 is not a prime number.", "Is 91 prime?", None),
    ("Hence proved.", "Prove that ...", None),
    ("So the final output would be:\n\n```\n[1, 2, 3]\n```", "What does this code print?", "[1, 2, 3]"),
    ("So the output is `[1, 2, 3]`.", "What does this code print?", "[1, 2, 3]"),
    ("So the function returns 15.", "What does f(5) return in this Python code?", "15"),
    ("So the minimum number of moves is 7.\n\nI'm confident in this answer.", None, "7"),
    ("So the minimum number of moves is 7.\n\nThat should be it.", None, "7"),
    ("Therefore, the answer is 7.\n\nI think that's right.", None, "7"),
    ("Therefore, the answer is 7. Let me double check: 3+4=7. Yes.", None, "7"),
    ("So the answer is 17, I believe.", None, "17"),
    ("The answer: 17", None, "17"),
    ("Ans: 17", None, "17"),
    ("= 17", None, "17"),
    ("So, x equals 17.", None, "17"),
    ("Thus x=17.", None, "17"),
    ("That gives us a total of 17 apples.", None, "17"),
    ("So we need 17 buses.", None, "17"),
]


@pytest.mark.parametrize(("tail", "prompt", "answer"), TAILS)
def test_a_careful_readers_answer_is_found(tail: str, prompt: str | None, answer: str | None) -> None:
    value = split(START + tail, prompt=prompt, size=4).answer
    assert value is None if answer is None else value is not None and compare(value, answer), value
