"""Every option of every command has a test that shows it to reach the code it names.

The table names that test. A new option fails here until it has one, and so does a test that is renamed or no longer
mentions the option (in itself, or in the table of cases of its file).
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_GENERATE = "generate/test_command.py::test_every_flag_reaches_the_code_it_names"
_TEXT = "generate/test_command.py::test_text_goes_to_stdout_and_the_last_line_of_stderr_says_why_it_stopped"
_FIT = "fit/test_fit_command.py::test_every_flag_reaches_the_plan"
_CHAT = "chat/test_chat_command.py::test_flags_reach_the_conversation"
_REPLAY = "replay/test_replay.py::test_the_commands_write_a_receipt_and_repeat_it"
_CONVERT = "convert/test_convert_flags.py::test_every_flag_reaches_the_conversion"
_VERIFY = "verify/test_verify.py::test_the_command_speaks_on_stderr_and_in_json"
_COMPARE = "compare/test_compare.py::test_json_has_everything_and_reference_and_tokens_are_honoured"
_BENCH = "bench/test_bench.py::test_the_command_prints_a_table_and_one_json_line"
_KEPT = "generate/test_keeping.py::test_the_flags_reach_the_keeper_and_a_full_context_is_saved_and_gone_on_with"

# Command -> test -> the options it shows.
SHOWN: dict[str, dict[str, str]] = {
    "generate": {
        _GENERATE: "--system-prompt --model --force --max-tokens --context --kv-bits --prefill-step --stop "
        "--think-tokens --answer-tokens --on-loop --temp --top-p --top-k --min-p --seed --repetition-penalty "
        "--presence-penalty --frequency-penalty --dry-multiplier --dry-base --dry-allowed-length --ban "
        "--language-guard --order --logit-bias",
        _TEXT: "--prompt",
        "generate/test_command.py::test_json_prints_the_whole_trace_as_one_line": "--json --quiet",
        _KEPT: "--save --save-every --resume",
        "generate/test_hangup.py::test_without_save_a_run_cut_short_is_kept_unless_no_save_is_given": "--no-save",
        "generate/test_answer_later.py::test_the_command_saves_a_run_without_an_answer_and_asks_for_it": "--answer-now",
        "generate/test_batch.py::test_a_signal_ends_the_batch_with_its_lines_and_the_way_on": "--input --output",
        _REPLAY: "--receipt",
    },
    "fit": {
        _FIT: "--ram --context --kv-bits --samples --prefill-step --compute-type --draft --draft-tokens --reserve "
        "--json",
        "fit/test_fit_command.py::test_a_folder_is_planned_from_its_headers_on_this_machine": "--model",
    },
    "chat": {
        _CHAT: "--system-prompt --temp --seed --max-tokens --think-tokens --context --kv-bits",
        "chat/test_chat_command.py::test_the_model_and_force_reach_the_loader": "--model --force",
    },
    "replay": {_REPLAY: "--model --other-weights --json --quiet"},
    "convert": {
        _CONVERT: "--source --revision --output --recipe --target-size --calibrate --force --restart --keep-source "
        "--dry-run --workers --quality --no-quality --quality-tokens --quiet",
        "convert/test_convert_command.py::test_a_dry_run_prints_the_plan_and_writes_nothing": "--json",
    },
    "verify": {_VERIFY: "--full --sample --source --tensors --seed --json --quiet"},
    "compare": {
        _COMPARE: "--reference --text --tokens --json",
        "compare/test_compare.py::test_progress_is_shown_on_a_terminal_unless_quiet": "--quiet",
    },
    "bench": {_BENCH: "--model --layers --tokens --repeats"},
}
COMMANDS = sorted(path.parent.name for path in (TESTS.parent / "qwq_mlx").glob("*/__main__.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_shown_by_a_named_test(command: str) -> None:
    parser = importlib.import_module(f"qwq_mlx.{command}.__main__")._parser()
    options = {text for action in parser._actions for text in action.option_strings if text.startswith("--")}
    shown = [option for group in SHOWN[command].values() for option in group.split()]
    assert sorted(shown) == sorted(options - {"--help"})


@pytest.mark.parametrize("name", sorted({name for command in SHOWN.values() for name in command}))
def test_the_named_test_is_there_and_mentions_its_options(name: str) -> None:
    file, _, function = name.partition("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    mentioned = {text.partition("=")[0] for text in texts if isinstance(text, str) and text.startswith("--")}
    for options in (command.get(name, "") for command in SHOWN.values()):
        assert set(options.split()) <= mentioned
