"""How a model marks its reasoning: one `Profile` per family, as data.

QwQ-32B-Preview writes no tags. It thinks in plain paragraphs and usually ends with a heading and a box:
"**Final Answer**", blank line, "\\[ \\boxed{...} \\]". Later models put the thinking between <think> and </think>, and
their template may already have written the opening tag.

Does not: read a text (`answer` does) or know token ids (`generate` encodes the cue with the model's tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_mlx.errors import OptionError

__all__ = ["PROFILES", "Profile", "find_profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How one family of models separates thinking from answer.

    name: as `find_profile` takes it.
    open_tag, close_tag: around the thinking; None for a family without tags. Both or neither.
    cue: text that ends the thinking and asks for the answer when it is put into the output; it stands after a line
    break of its own, so it does not begin with one.
    Raises OptionError for one tag without the other, or an empty cue.
    """

    name: str
    open_tag: str | None
    close_tag: str | None
    cue: str

    def __post_init__(self) -> None:
        if bool(self.open_tag) != bool(self.close_tag):
            raise OptionError(
                f"profile {self.name!r}: open_tag is {self.open_tag!r} and close_tag {self.close_tag!r}, "
                "expected both or neither. Give both tags, or None twice for a model without tags."
            )
        if not self.cue.strip():
            raise OptionError(
                f"profile {self.name!r}: cue is {self.cue!r}, expected the text that asks for the answer. "
                "Without it a thinking budget could not end the thinking."
            )

    @property
    def has_tags(self) -> bool:
        """Whether the thinking stands between tags."""
        return self.close_tag is not None

    def request_for_box(self, *, is_closed: bool) -> str:
        """Text behind which the answer and a closing brace follow, whatever came before it.

        is_closed: whether a tag has closed the thinking already.
        """
        return (self.cue if self.has_tags and not is_closed else "") + "**Final Answer**\n\n\\[ \\boxed{"


_PREVIEW = Profile(name="qwq-preview", open_tag=None, close_tag=None, cue="**Final Answer**\n\n")
_TAGGED = Profile(name="qwq-tagged", open_tag="<think>", close_tag="</think>", cue="</think>\n\n")

PROFILES = {profile.name: profile for profile in (_PREVIEW, _TAGGED)}
"""Every profile by its name; `qwq_mlx.facts` says which model uses which."""


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises OptionError listing the names there are.

    >>> find_profile("qwq-tagged").close_tag
    '</think>'
    """
    if name not in PROFILES:
        raise OptionError(f"reasoning profile {name!r} is unknown, expected one of: {', '.join(sorted(PROFILES))}.")
    return PROFILES[name]
