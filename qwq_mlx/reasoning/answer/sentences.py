"""Sentences that state an answer: "So the correct answer is option 2.", "**Answer:** B", "答案是 5".

Each pattern below finds, in one line, where the stated value begins; `value_of` reads it. Which pattern goes first is
written in `rules`. Patterns are linear: no nested repetition, and a line is cut at `MAX_LINE` characters, so a hostile
line costs no more than a long one.

Does not: judge whether the statement is final, or understand negation beyond "is not".
"""

from __future__ import annotations

import re

__all__ = [
    "ANSWERS_THE_QUESTION",
    "ANSWER_IS",
    "ANSWER_IS_ELSEWHERE",
    "CALLED_RIGHT",
    "CHINESE_ANSWER_IS",
    "CHINESE_CALLED_RIGHT",
    "CHINESE_CHOSEN",
    "CHOSEN",
    "CORRECTION",
    "GSM8K",
    "IS_THE_ANSWER",
    "IT_IS",
    "JSON_FIELD",
    "LABELLED",
    "LEAVES",
    "PICKED",
    "SHOULD_BE",
    "value_of",
]

_NOUN = r"(?:answers?|options?|choices?|solutions?|results?|conclusion)"
_IS = (
    r"(?:is|are|was|were|equals|should be|must be|would be|will be|has to be|seems to be|appears to be|remains|becomes"
    r"|(?:come|turn|work)s? out (?:to be|as|at|to)|ends up (?:being|as))"
)
# Nouns for the answer and verbs for "is", by language: one line of data each.
_NOUNS_AND_VERBS = {
    "ar": ("الإجابة|الجواب|الناتج|الحل|النتيجة", "هي|هو"),
    "de": ("Antwort|Lösung|Ergebnis|Endergebnis", "ist|lautet|beträgt|wäre"),
    "es": ("respuesta|resultado|solución", "es|sería|será"),
    "fr": ("réponse|résultat|solution", "est|vaut|serait|sera"),
    "he": ("התשובה|תשובה|התוצאה", "היא|הוא"),
    "hi": ("उत्तर|जवाब", "है"),
    "id": ("jawaban(?:nya)?|hasil(?:nya)?", "adalah|ialah"),
    "it": ("risposta|risultato|soluzione", "è|sarà|sarebbe"),
    "ja": ("答え|解答|正解|最終回答|答", "は|とは"),
    "ko": ("답|정답|해답|답변", "은|는|이"),
    "nl": ("antwoord|resultaat|oplossing", "is|luidt|bedraagt"),
    "pl": ("odpowiedź|odpowiedzią|wynik|rozwiązanie", "to|jest|brzmi|wynosi"),
    "pt": ("resposta|resultado|solução", "é|será|seria"),
    "ru": ("ответ|ответом|результат|решение", "равен|это|является|будет|—|-"),
    "sv": ("svaret|svar|resultatet", "är|blir"),
    "tr": ("cevap|yanıt|sonuç", "="),
    "uk": ("відповідь|результат", "дорівнює|це|—|-"),
    "vi": ("đáp án|câu trả lời|kết quả|đáp số", "là|bằng"),
}
ANSWER_IS_ELSEWHERE = re.compile(
    r"(?<![^\W_])(?:"
    + "|".join(
        rf"(?:{nouns})(?:\s+[^\W\d_]{{1,14}}){{0,2}}?[\s*_]*(?:(?:{verbs})(?![^\W\d_])[:：]?|[:：])"
        for nouns, verbs in _NOUNS_AND_VERBS.values()
    )
    + r")[\s*_]*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_OPTION = r"(?:option\s+|choice\s+|answer\s+)?"
_LETTER = r"\(?(?P<rest>[A-J])\)?"
_END = r"\s*[.!]?\s*$"

JSON_FIELD = re.compile(
    r'["\'](?:final_)?answer["\']\s*:\s*(?P<rest>"(?:[^"\\]|\\.)*"|\[[^\[\]{}\n]{0,200}\]|[-\w.]+)', re.IGNORECASE
)
LABELLED = re.compile(
    r"^[^\w\n]{0,12}(?:(?:final|correct|the|my)\s+){0,2}(?:ans|answers?|solution|result)[\s*_]*(?:[=-]>|[:=→⇒])[\s*_]*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
ANSWER_IS = re.compile(
    r"(?:^\W{0,8}|\b(?:the|my|our|this)\s+)(?:(?:final|correct|right|best|only|required|desired|overall|same)\s+){0,2}"
    rf"(?:{_NOUN}|(?<=correct )one|(?<=right )one)(?:\s+(?:here|then|(?:to|for) (?:the|this|our) (?:question|problem)"
    r"|(?:that |which )?(?:i|we|you|they)(?:'re|'m| are| am| were)? [\w ]{1,24}))?,?(?:\s+|(?='s\s))"
    rf"(?:(?:indeed|still|clearly|definitely|simply|therefore|thus|probably|likely)\s+)?(?:{_IS}|'s)(?![\w-])"
    r"(?:\s+(?:indeed|still|clearly|definitely|simply|that|therefore|thus|probably|likely|just))*"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
CORRECTION = re.compile(
    r"^\W{0,8}(?:correction|corrected|edit|update)\b[^:：\n]{0,20}[:：]\s*(?P<rest>\S.*)", re.IGNORECASE
)
SHOULD_BE = re.compile(
    r"^\W{0,4}(?:wait|no|actually|hmm+|hold on|sorry|oops)\b.{0,200}?\bit (?:should|must) be\s+(?P<rest>[-+$\\(]*\d.*)",
    re.IGNORECASE,
)
CHOSEN = re.compile(
    r"\b(?:option|choice)\s+\(?(?P<rest>[A-J]|\d{1,2})\)?(?:\s+(?:is|seems|must be|should be|would be)\s+(?:\w+\s+)?"
    r"(?:correct|right|the (?:correct|right|best)\s+\w+)|\s*[.!]?\s*$)",
    re.IGNORECASE,
)
CALLED_RIGHT = re.compile(
    r"(?:^|[\s(*])(?:option\s+)?\(?(?P<rest>[A-J])\)?\*{0,2}\s+(?:is|must be|should be)\s+(?:indeed\s+)?"
    r"the\s+(?:correct|right|best)\s+(?:answer|option|choice)",
    re.IGNORECASE,
)
CHINESE_CALLED_RIGHT = re.compile(r"选项\s*[(（]?(?P<rest>[A-J])[)）]?\s*(?:是|为)?正确")
PICKED = re.compile(
    rf"\b(?:i|we)(?:'ll|'d| will| would)?\s+(?:choose|pick|select|go with|opt for)\s+{_OPTION}{_LETTER}{_END}",
    re.IGNORECASE,
)
IT_IS = re.compile(
    rf"^(?:so|thus|therefore|hence),?\s+it(?:'s| is| must be)\s+(?:option\s+)?{_LETTER}(?:{_END}|\s*,\s)", re.IGNORECASE
)
LEAVES = re.compile(rf"\bleav(?:es|ing)\s+(?:us with\s+|only\s+|just\s+){{0,2}}{_OPTION}{_LETTER}{_END}", re.IGNORECASE)
GSM8K = re.compile(r"^#{3,4}\s*(?P<rest>[-+]?\$?\d[\d,.]*)\s*$")
IS_THE_ANSWER = re.compile(
    r"(?:^|,\s+|\b(?:so|thus|hence|therefore|that makes|which makes|making)\s+)"
    r"(?P<rest>[-+]?[$\\(\[]{0,2}[\w{][^\s,;]{0,60})"
    r"(?:\s+(?:is|must be|should be)(?:\s+indeed)?)?\s+(?:the|my|our)\s+(?:final |correct |right )?answer\W*$",
    re.IGNORECASE,
)
ANSWERS_THE_QUESTION = re.compile(r"\banswer (?:the|this|your|our) question[:,]\s+(?P<rest>\S.*)", re.IGNORECASE)
CHINESE_ANSWER_IS = re.compile(
    r"(?:(?:答案|结果|(?:正确|最佳)的?(?:选项|答案))(?:应该|应当|应|就)?(?:是|为|等于|选择?|[:：])|^答[:：])\s*(?P<rest>\S.*)",
    re.DOTALL,
)
CHINESE_CHOSEN = re.compile(
    r"(?<!不)选择?(?:答案|选项)?[:：]?\s*[(（]?(?P<rest>[A-J])(?![A-Za-z])[)）]?(?!\s*(?:错|不对|不正确|是错))"
)

_NO_VALUE = re.compile(
    r"^(?:\\boxed\{\s*\}|"
    r"not\b|n't\b|correct\b|right\b|wrong\b|incorrect\b|clear\b|in the\b|to be\b|what\b|still\b$)",
    re.I,
)
_HEDGE = re.compile(
    r"^(?:(?:approximately|about|roughly|around|nearly|exactly|at|on|just|only|simply|indeed|equal to|given by)\s+)+"
    r"(?=\S)",
    re.I,
)
# What follows a value and says why: the value ends before it. Only behind a number, a formula or a short word.
_REASON = re.compile(
    r"(?<=[\d\w)$}*%\]]),?\s+(?:because|since|as (?:we|i|it|the|each|shown|found)|which|given that|due to"
    r"|so (?:we|the|i)|where|rather than|instead of"
    r"|or (?:about|approximately|roughly|equivalently|simply))\b"
    r"|(?<=[\d)$}%\]]),\s+(?:not|as|but|and (?:not|we|i|this|that|it)|i (?:believe|think|guess|suppose))\b",
    re.I,
)
_STRUCK = re.compile(r"~~[^~\n]{1,80}~~")
_CORRECTION = re.compile(  # "7... no, 8", "7. Correction: 8."
    r"[\s,.;:—–-](?:no|wait|sorry|actually|correction|rather|i mean)\b[\s,:]+(?:it is |it's )?"
    r"(?P<value>\$?\\?\(?[-−]?(?:\d[\d.,/]*|[A-J])\\?[)$]?)[\s.!)]*$",
    re.IGNORECASE,
)
_BOX = re.compile(r"^\$?\\?f?boxed\s*[{\[]?\s*(.+?)\s*[}\]]?\s*\$?$")
_COPULA = re.compile(r"(?<=[\d\w)}$])\s*(?:です|である|だ|となります|になります|입니다|이다|है|हैं|dir|dır|dur|dür)$")
_BRACKETED = re.compile(r"([(（\[<{【]{1,2})?([A-J])(?:[)）\]>}】]{1,2}|[)）．、】\]].*)", re.DOTALL)
_GLOSS = re.compile(r"(?<=[A-J])\s*\([^()]{2,60}\)")
_SEVERAL = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|&|\band\b|\bor\b|、|和)\s*(?:\band\b\s*)?\(?[A-J]\)?)+[\s.]*")


def value_of(rest: str) -> str | None:
    """The value at the beginning of what follows "the answer is", without hedges, markup and reasons; None for none."""
    value = _STRUCK.sub("", rest).strip().lstrip(":：").strip()
    if (correction := _CORRECTION.search(value)) is not None:
        value = correction["value"]
    if value.startswith('"') and (end := value.find('"', 1)) > 0:
        return value[1:end].strip() or None
    if _SEVERAL.fullmatch(named := _GLOSS.sub("", value.replace("*", ""))):
        return ", ".join(re.findall(r"[A-J]", named))
    value = re.sub(r"^not\b[^.;]{1,80}?\bbut(?:\s+rather)?\s+(?=\S)", "", value, flags=re.IGNORECASE)
    value = re.split(r"(?<=[^\d\W])[.!?。！](?=\s|$)|(?<=[\d)\]}*$])[.!?。！](?=\s|$)|\n|[。！]", value, maxsplit=1)[0]
    value = _unboxed(value)
    value = _HEDGE.sub("", _bold(value).strip().strip("*_`").strip())
    value = _REASON.split(value, maxsplit=1)[0]
    value = re.sub(r"^(yes|no),\s.*", r"\1", value, flags=re.IGNORECASE)
    value = re.sub(
        r"^(?:(?:option|choice|number)\s+|选项\s*)(?=[(（]?[A-Ja-j\d](?![A-Za-z]))", "", value, flags=re.IGNORECASE
    )
    if _SEVERAL.fullmatch(value):
        return ", ".join(re.findall(r"[A-J]", value))
    choice = re.match(r"^(\()?([A-J]|\d{1,2})(?(1)\)|\)?)(?:[:.)．：]\s+\S|\s*[,;-]\s+[A-Za-z]{2}|\s*\()", value)
    choice = choice or re.fullmatch(
        r"([(（\[<{【]{1,2})?([A-J])(?:[)）\]>}】]{1,2}$|[)）\]>}】]|[)）．、】\]].*)", value, re.DOTALL
    )
    if choice:
        value = choice[2]
    value = _COPULA.sub("", value.strip(" .;,:!*_`。"))
    if value.startswith("\\(") and value.endswith("\\)"):
        value = value[2:-2].strip()
    if len(value) > 1 and value.startswith("$") and value.endswith("$"):
        value = value.strip("$").strip()
    return None if not value or len(value) > 300 or _NO_VALUE.match(value) else value


def _unboxed(value: str) -> str:
    """The content of a value that is one box, also of one whose end is cut: "\\boxed{42"."""
    box = _BOX.match(value)
    outside = re.sub(r"\{[^{}]*\}", "", re.sub(r"\{[^{}]*\}", "", box[1])) if box else "{"
    return box[1] if box and not {"{", "}"} & set(outside) else value


def _bold(value: str) -> str:
    """The part in bold where a value has one, also where its opening ** was taken off with the label before it."""
    before, mark, after = value.partition("**")
    if not mark:
        return value
    if not re.fullmatch(r"(?:option|choice|answer)?\s*", before, re.IGNORECASE):
        return before if value.count("**") % 2 else value.replace("**", "")
    return after.partition("**")[0] or value
