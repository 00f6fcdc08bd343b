"""Profiles: what is known of each family's marks, and the refusal of what is not."""

from __future__ import annotations

import pytest

from qwq_mlx.errors import OptionError
from qwq_mlx.facts import MODELS
from qwq_mlx.reasoning.profile import Profile, find_profile


def test_every_model_of_the_facts_has_a_profile() -> None:
    for model in MODELS:
        assert find_profile(model.profile).name == model.profile


def test_an_unknown_profile_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(OptionError, match=r"'qwq' is unknown, expected one of: qwq-preview, qwq-tagged"):
        find_profile("qwq")


def test_one_tag_alone_is_refused() -> None:
    with pytest.raises(OptionError, match=r"close_tag None, expected both or neither"):
        Profile(name="x", open_tag="<think>", close_tag=None, cue="So:")


def test_an_empty_cue_is_refused() -> None:
    with pytest.raises(OptionError, match=r"cue is ' ', expected the text that asks for the answer"):
        Profile(name="x", open_tag=None, close_tag=None, cue=" ")
