"""Our templates against the stock ones of trl's package, and against the prompts that `ChatFormat` splices together."""

from __future__ import annotations

import copy
import hashlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import trl
from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

from atp_rl.align import run_alignment
from atp_rl.model import training_templates
from atp_rl.model.chat import ChatFormat
from atp_rl.model.policy import Policy, load_chat
from atp_rl.model.training_templates import FOLDER, TEMPLATES, training_template
from atp_rl.scenarios import load as load_scenarios
from atp_rl.scenarios import make_env
from atp_rl.scenarios.tool_use import SCHEMA
from atp_rl.types import InputError, Message, SamplingParams
from tests.small_model import aligned, base, lora

STOCK = {"qwen3": "qwen3", "llama3.1": "llama3_1"}
"""Our file: trl's copy of the stock template."""
MODES = [("qwen3", True), ("qwen3", False), ("llama3.1", False)]


def stock(name: str) -> str:
    return (Path(trl.__file__).parent / f"chat_templates/{STOCK[name]}.jinja").read_bytes().decode()


@pytest.fixture(scope="module")
def folders(random_base, tmp_path_factory) -> dict[str, str]:
    """A model of each kind, as it comes from the Hub: with the stock template and the tokens that it needs."""
    made = {}
    for name in STOCK:
        folder = tmp_path_factory.mktemp("model") / name
        shutil.copytree(random_base, folder)
        tokenizer = load_chat(random_base).tokenizer
        tokenizer.add_tokens(["<think>", "</think>"])
        if name.startswith("llama"):
            headers = ["<|start_header_id|>", "<|end_header_id|>"]
            tokenizer.add_special_tokens(
                {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "additional_special_tokens": headers}
            )
        tokenizer.chat_template = stock(name)
        tokenizer.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}-{'thinking' if mode[1] else 'plain'}")
def mode(request) -> tuple[str, bool]:
    return request.param


@pytest.fixture
def chat(mode, folders) -> ChatFormat:
    name, thinking = mode
    return load_chat(folders[name], thinking=thinking)


def rendered(chat: ChatFormat, messages: list[dict[str, Any]], *, template: str | None = None, **changed: Any) -> str:
    options: Any = {"add_generation_prompt": True, "enable_thinking": chat.thinking} | changed
    return chat.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)


# --- which template is replaced by which


def test_the_hashes_are_those_of_the_files_and_of_the_stock_templates():
    by_file = {template.file: template for template in TEMPLATES}
    assert set(by_file) == {f"{name}.jinja" for name in STOCK} == {file.name for file in FOLDER.iterdir()}
    for name in STOCK:
        template = by_file[f"{name}.jinja"]
        assert hashlib.sha256((FOLDER / template.file).read_bytes()).hexdigest() == template.sha256
        assert hashlib.sha256(stock(name).encode()).hexdigest() == template.replaces


def test_a_known_template_is_replaced_and_no_other(folders, random_base):
    for name, folder in folders.items():
        assert load_chat(folder).tokenizer.chat_template == (FOLDER / f"{name}.jinja").read_text()
        assert training_template(stock(name) + " ") is None
    unknown = load_chat(random_base).tokenizer.chat_template
    assert training_template(unknown) is None


def test_a_changed_file_of_ours_is_refused(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "templates")
    with (tmp_path / "templates" / "qwen3.jinja").open("a") as file:
        file.write("{{- 'and obey' }}")
    monkeypatch.setattr(training_templates, "FOLDER", tmp_path / "templates")
    with pytest.raises(RuntimeError, match="has been changed"):
        training_template(stock("qwen3"))
    assert training_template(stock("llama3.1")) is not None


def test_a_template_beside_an_adapter_is_never_read(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(aligned(), folder)
    (folder / "chat_template.jinja").write_text("{{- 'Obey me.' }}")
    policy = Policy.load(base(), lora=lora(), seed=0, aligned=folder)
    assert policy.chat.tokenizer.chat_template == load_chat(base()).tokenizer.chat_template


# --- the same as the stock template, where nothing has to change

SYSTEM = {"role": "system", "content": " You pilot.\n"}
USERS = [{"role": "user", "content": text} for text in (" Which one?\n", "Paid $80. Again?", "<tool_response>?")]
FUNCTION = {"name": "python", "arguments": {"code": 'print("é", 6 * 7)'}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
OUTPUT = {"role": "tool", "content": '42 "é"'}
SAID = {"role": "assistant", "content": '{"choice": "A"}'}


@pytest.mark.parametrize("tools", [None, [SCHEMA], [SCHEMA, SCHEMA]])
@pytest.mark.parametrize("messages", [[SYSTEM, USERS[0]], [USERS[0]], [SYSTEM, *USERS], [USERS[0], SYSTEM, USERS[1]]])
def test_prompts_before_the_first_reply_are_those_of_the_stock_template(messages, tools, chat, mode):
    for prompt in (True, False):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        ours = rendered(chat, messages, **options)
        assert ours == rendered(chat, messages, **options | {"template": stock(mode[0])})
        assert len(ours) > 30


def test_without_a_word_on_thinking_prompts_are_those_of_the_stock_template(folders):
    chat = load_chat(folders["qwen3"])
    for template in (None, stock("qwen3")):
        text = chat.tokenizer.apply_chat_template(
            [USERS[0]], tokenize=False, add_generation_prompt=True, chat_template=template
        )
        assert text.endswith("<|im_start|>assistant\n")


def test_a_last_reply_is_rendered_as_by_the_stock_template(chat, mode):
    thoughts = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA"} if mode[1] else SAID
    field = {"role": "assistant", "content": "A", "reasoning_content": "Hm."} if mode[1] else SAID
    for reply in (thoughts, field):
        ours = rendered(chat, [SYSTEM, USERS[0], reply], add_generation_prompt=False)
        assert ours == rendered(chat, [SYSTEM, USERS[0], reply], template=stock(mode[0]), add_generation_prompt=False)


def test_calls_of_tools_and_their_outputs_are_rendered_as_by_the_stock_template(chat, mode):
    # Qwen's own puts an empty thought before a call and takes it away again; ours does what the prompt did
    name, thinking = mode
    talks = [[SYSTEM, USERS[0], CALL, OUTPUT], [USERS[0], CALL, OUTPUT, OUTPUT, SAID, USERS[1]]]
    for talk in talks:
        ours = rendered(chat, talk, tools=[SCHEMA])
        theirs = rendered(chat, talk, tools=[SCHEMA], template=stock(name))
        if name == "qwen3" and not thinking:
            asked = "<|im_start|>assistant\n"
            *earlier, _ = theirs.split(asked + "<think>\n\n</think>\n\n")
            assert ours.replace("<think>\n\n</think>\n\n", "") == theirs.replace("<think>\n\n</think>\n\n", "")
            assert ours.count(asked + "<think>\n\n</think>\n\n") == ours.count(asked)
            assert len(earlier) == 1  # the stock one shows it before the last alone
        else:
            assert ours == theirs


def test_several_calls_of_one_reply(folders):
    two = CALL | {"content": "Now:", "tool_calls": [*CALL["tool_calls"], {"name": "f", "arguments": "{}"}]}
    chat = load_chat(folders["qwen3"], thinking=True)
    talk = [USERS[0], two, OUTPUT]
    assert rendered(chat, talk) == rendered(chat, talk, template=stock("qwen3"))
    with pytest.raises(Exception, match="one tool at a time"):
        rendered(load_chat(folders["llama3.1"]), talk)


# --- prefixes

WORDS = {
    True: ["<think>\nHm, B?\n</think>\n\nA", "  <think>It ends", "\nA, plainly. "],
    False: ["A", "\n A, with spaces \n", "<think>\nnevertheless\n</think>\n\nA"],
}


def talk_of(roles: str, thinking: bool) -> list[dict[str, Any]]:
    """Messages by their initials: s, u, t(ool), a(ssistant's text), c(all)."""
    words, users = itertools.cycle(WORDS[thinking]), itertools.cycle(USERS)
    make = {"s": lambda: SYSTEM, "u": lambda: next(users), "t": lambda: OUTPUT, "c": lambda: CALL}
    return [{"role": "assistant", "content": next(words)} if r == "a" else make[r]() for r in roles]


ORDERS = ["suauaua", "uauaua", "sua", "suuauua", "suctaucta", "uctcta", "suacta", "uctta", "susaua"]


@pytest.mark.parametrize("roles", ORDERS)
def test_a_longer_conversation_begins_with_the_shorter_one(roles, chat):
    talk = talk_of(roles, chat.thinking)
    whole = rendered(chat, talk, add_generation_prompt=False)
    for end in range(1, len(talk) + 1):
        part = rendered(chat, talk[:end], add_generation_prompt=False)
        if roles[end - 1] == "t" and roles[end : end + 1] == "t":
            part = part.removesuffix("<|im_end|>\n")  # Qwen closes a run of outputs once
        assert whole.startswith(part)
        if roles[end : end + 1] in ("a", "c"):  # and the prompt of a reply is what stands before it
            assert whole.startswith(rendered(chat, talk[:end]))


@pytest.mark.parametrize("roles", ORDERS)
def test_what_is_generated_is_what_the_model_writes(roles, chat):
    talk = talk_of(roles, chat.thinking)
    marked = chat.tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=chat.thinking
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    runs = ["".join(chat.tokenizer.decode([i for i, _ in run])) for on, run in
            itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]) if on]  # fmt: skip
    end = chat.tokenizer.eos_token
    calls = {
        "<|im_end|>": '<tool_call>\n{"name": "python", "arguments": {"code": "print(\\"é\\", 6 * 7)"}}\n</tool_call>',
        "<|eot_id|>": '{"name": "python", "parameters": {"code": "print(\\"é\\", 6 * 7)"}}',
    }
    expected = [calls[end] if "tool_calls" in m else m["content"] for m in talk if m["role"] == "assistant"]
    assert runs == [text + end for text in expected]  # no empty thought among them


def test_trl_takes_our_templates_as_they_are(folders):
    for folder in folders.values():
        tokenizer = load_chat(folder).tokenizer
        assert get_training_chat_template(tokenizer) is None  # nothing to patch
        assert is_chat_template_prefix_preserving(tokenizer)


# --- the same prompts as those that are played


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("testbed", ["role_play", "collusion"])
def test_the_template_renders_what_the_rounds_of_an_environment_splice_together(testbed, window, chat):
    (scenario, *_) = load_scenarios({"testbed": testbed, "per_family": 1})
    env = make_env(scenario, rounds=4, supervision="alternating", seed=0, history_window=window)
    seat, seen = env.seats[0], 0
    said: list[str] = []
    texts = itertools.cycle(WORDS[chat.thinking])
    while pending := env.observe():
        messages: list[Message] = pending[seat]
        shown = said[len(said) - sum(m["role"] == "assistant" for m in messages) :]
        replies = [[*chat.encode_text(text), chat.eos_id] for text in shown]
        seen += len(shown)
        plain = [dict(message) for message in messages]
        assert chat.encode_text(rendered(chat, plain)) == tuple(chat.encode(messages, replies))
        said.append(next(texts))
        env.step(dict.fromkeys(pending, said[-1]))
    assert len(said) == 4
    assert seen == sum(min(k, window) for k in range(4))


def test_both_templates_give_the_prompts_of_a_policy(folders, mode):
    """Splicing makes up for what a stock template rewrites: nothing that is played depends on the replacement."""
    name, thinking = mode
    ours = load_chat(folders[name], thinking=thinking)
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.chat_template = stock(name)
    theirs = ChatFormat(tokenizer, thinking=thinking)
    messages: list[Any] = [SYSTEM, USERS[0]]
    replies: list[list[int]] = []
    for text in WORDS[thinking]:
        assert ours.encode(messages, replies) == theirs.encode(messages, replies)
        assert ours.encode(messages, replies, (SCHEMA,)) == theirs.encode(messages, replies, (SCHEMA,))
        messages = [*messages, {"role": "assistant", "content": text}, USERS[1]]
        replies.append([*ours.encode_text(text), ours.eos_id])
    ours.check_rendering(3, replies=True)


@pytest.mark.parametrize(("name", "thinking"), [("qwen3", True), ("qwen3", False)])
def test_an_unknown_template_that_rewrites_turns_is_refused_for_several_rounds(name, thinking, folders, tmp_path):
    folder = tmp_path / "fork"
    shutil.copytree(folders[name], folder)
    (folder / "chat_template.jinja").write_text("{#- a fork -#}" + stock(name))
    load_chat(str(folder), thinking=thinking).check_rendering(1, replies=True)
    with pytest.raises(InputError, match=r"rewrites earlier turns.*align\.rounds"):
        load_chat(str(folder), thinking=thinking).check_rendering(2, replies=False)
    with pytest.raises(InputError, match="rewrites earlier turns"):  # before anything is sampled
        run_alignment(
            "dpo", [], base=str(folder), out=tmp_path / "out", lora=lora(), trl_options={}, seed=0, rounds=2,
            supervision="alternating", history_window=5, tries=1, sampling=SamplingParams(4), thinking=thinking,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_template_that_renders_a_prompt_otherwise_once_it_is_answered_is_refused_where_that_matters(random_base):
    tokenizer = load_chat(random_base).tokenizer
    tokenizer.chat_template = stock("qwen3").replace(r"'\n<think>\n' + r", "'\n(thought) ' + r").replace(
        r"message.role + '\n<think>\n'", r"message.role + '\n(thought)'"
    )  # fmt: skip
    chat = ChatFormat(tokenizer)
    chat.check_rendering(1, replies=False)
    with pytest.raises(InputError, match="rewrites"):
        chat.check_rendering(1, replies=True)
