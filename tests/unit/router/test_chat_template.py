"""Chat templates: what transformers makes of them, what a client asks of them, what they must not be able to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from baton.common.errors import ConfigError, InvalidRequest, Unavailable
from baton.demo_model import demo_model_path
from router.chat_schema import take_chat
from router.chat_templates import ChatTemplates
from router.reader.chat import render_chat
from router.reader.environment import ChatEnvironment
from router.reader.pool import ReaderLimits, RequestReader

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TRIMMING = PLAIN.replace("message['content']", "message['content'] | trim")
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message.role == 'user' %}[INST] "
    "{{ message.content }} [/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{%- set ns = namespace(seen=false) %}{% if tools %}<tools>\n{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}</tools>\n{% endif %}{% for message in messages %}\n    <{{ message.role }}>"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function.name }}"
    "({{ call.function.arguments | tojson(indent=2) }}){% endfor %}{% endif %}{{ message.content }}\n"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}|{% endif %}{% endfor %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi <b>\u4f60</b> "},
    {"role": "assistant", "content": " Well, "},
]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "\u00e9<"}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def environment(**sources: str) -> ChatEnvironment:
    return ChatEnvironment(sources, TOKENS, 10_000)


def rendered(template: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    chat = take_chat({"messages": messages, **fields})
    return render_chat(chat, environment(default=template))


def oracle(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    rendered = render_jinja_template([messages], chat_template=template, **{**TOKENS, **arguments})
    return str(rendered[0][0])


@pytest.mark.parametrize("template", [PLAIN, TRIMMING, STRICT, MARKED], ids=["plain", "trimming", "strict", "marked"])
def test_the_same_text_as_transformers(template: str) -> None:
    asked = {"add_generation_prompt": True}
    assert rendered(template, TALK) == oracle(template, TALK, **asked)
    assert rendered(template, TALK, add_generation_prompt=False) == oracle(template, TALK)


@pytest.mark.parametrize("template", [PLAIN, TRIMMING, STRICT], ids=["plain", "trimming", "strict"])
def test_the_last_message_is_continued_as_transformers_does(template: str) -> None:
    text = rendered(template, TALK, continue_final_message=True)
    assert text == oracle(template, TALK, continue_final_message=True)
    assert text.rstrip().endswith("Well,")


def test_tools_calls_and_their_answers_reach_the_template() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]
    text = rendered(TOOLS, messages, tools=[TOOL], tool_choice="none", chat_template_kwargs={"enable_thinking": False})
    call = {**CALL, "function": {"name": "add", "arguments": {"a": 1, "b": "\u00e9<"}}}
    plain = [messages[0], {"role": "assistant", "content": "", "tool_calls": [call]}, messages[2]]
    assert text == oracle(TOOLS, plain, tools=[TOOL], add_generation_prompt=True, enable_thinking=False)
    assert text.startswith('<tools>\n{"type": "function"')


def test_text_parts_are_joined_and_unset_fields_are_absent() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "[user] a\nb</s>" in rendered(PLAIN, [{"role": "user", "content": parts, "tool_calls": None}])


def test_developer_messages_are_system_messages_to_templates_that_do_not_know_them() -> None:
    message = {"role": "developer", "content": "x"}
    assert "[system] x" in rendered(PLAIN, [message])
    assert "[developer] x" in rendered("{# developer #}" + PLAIN, [message])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "1 to"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": ["hi"]}, "messages", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "image_url",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
            "messages[0].tool_calls[0].function.arguments",
        ),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, **wrong}]}]}, "messages", words)
            for wrong, words in (
                ({"id": True}, "messages[0].tool_calls[0].id"),
                ({"type": "custom"}, "messages[0].tool_calls[0].type"),
                ({"function": {"name": "f", "arguments": []}}, "messages[0].tool_calls[0].function.arguments"),
            )
        ),
        ({"tools": [TOOL]}, "tools", "tool_choice none"),
        ({"tools": [TOOL], "tool_choice": "none"}, "tools", "does not use tools"),
        ({"tool_choice": "required"}, "tool_choice", "none"),
        ({"documents": [{"text": "x"}]}, "documents", "does not use documents"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not use"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", "enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set messages"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs", "may not set bos_token"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template", "model's own"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
        ({"add_generation_prompt": 1}, "add_generation_prompt", "boolean"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        rendered(PLAIN, **{"messages": [{"role": "user", "content": "x"}], **fields})
    assert error.value.param == param
    assert words in str(error.value)


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        rendered(STRICT, [TALK[1]])
    assert error.value.code == "chat_template_refused"


def test_templates_are_chosen_by_name_and_by_tools() -> None:
    named = environment(default=PLAIN, tool_use=TOOLS, rag="{{ messages[0].content }}!")
    talk = [{"role": "user", "content": "x"}]

    def with_fields(env: ChatEnvironment, **fields: Any) -> str:
        return render_chat(take_chat({"messages": talk, **fields}), env)

    assert with_fields(named, chat_template="rag") == "x!"
    assert with_fields(named, tools=[TOOL], tool_choice="none").startswith("<tools>")
    assert with_fields(named).startswith("<s>[user]")
    with pytest.raises(InvalidRequest, match="name one of a, b"):
        with_fields(environment(a=PLAIN, b=PLAIN))
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja"):
        with_fields(environment())
    with pytest.raises(InvalidRequest, match="TemplateSyntaxError"):
        with_fields(environment(default="{% if %}"))


HOSTILE = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "unsafe"),
    "huge text": ("{{ 'a' * 100000000000 }}", "too much memory"),
    "long output": ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "not text": (r"{{ '\ud800' }}", "UnicodeEncodeError"),
    "empty cycle": ("{{ cycler() }}", "RuntimeError"),
    "not there": ("{{ messages[9].content }}", "UndefinedError"),
}


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_template_harms_nobody(name: str) -> None:
    source, words = HOSTILE[name]
    templates = ChatTemplates({"default": PLAIN, "hostile": source}, TOKENS)
    reader = RequestReader(templates, ReaderLimits(memory_bytes=512 * 2**20, max_chars=1000), num_processes=1)
    try:
        with pytest.raises(InvalidRequest, match=words):
            await reader.chat(body(chat_template="hostile"))
        assert (await reader.chat(body())).texts == ["<s>[user] x</s>\n[assistant] "]
    finally:
        await reader.close()


@pytest.fixture
async def endless() -> AsyncIterator[RequestReader]:
    """One process, whose hostile template would run for hours, in Python or inside one C function."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    templates = ChatTemplates(
        {"default": PLAIN, "loop": loop, "power": "{{ 7 ** (7 ** (8 + messages | length)) }}"}, TOKENS
    )
    reader = RequestReader(templates, ReaderLimits(cpu_s=0.5), num_processes=1)
    yield reader
    await reader.close()


@pytest.mark.parametrize("name", ["loop", "power"])
async def test_an_endless_template_is_ended_and_the_next_request_answered(endless: RequestReader, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"took over 0\.5 s") as error:
        await endless.chat(body(chat_template=name))
    assert error.value.code == "too_expensive"
    assert (await endless.chat(body())).texts == ["<s>[user] x</s>\n[assistant] "]


async def test_a_refusal_of_a_template_may_not_be_endless() -> None:
    templates = ChatTemplates({"default": "{{ raise_exception('no ' + messages[0].content * 1000000) }}"}, TOKENS)
    reader = RequestReader(templates, num_processes=1)
    try:
        with pytest.raises(InvalidRequest, match="no xxx") as error:
            await reader.chat(body())
        assert len(str(error.value)) <= 2000
    finally:
        await reader.close()


async def test_what_waits_for_a_process_is_dropped_with_its_client(endless: RequestReader) -> None:
    """Of forty requests that would each take half a second, the one that is being read ends; the others never begin."""
    waiting = [asyncio.create_task(endless.chat(body(chat_template="loop"))) for _ in range(40)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(15.0):
        assert (await endless.chat(body())).texts == ["<s>[user] x</s>\n[assistant] "]


async def test_a_reader_closed_while_its_process_starts_leaves_none() -> None:
    reader = RequestReader(ChatTemplates({"default": PLAIN}, TOKENS))
    reader.start()
    await asyncio.sleep(0)
    await asyncio.wait_for(reader.close(), 20)


async def test_a_closed_reader_leaves_no_process_and_reads_no_more() -> None:
    reader = RequestReader(ChatTemplates({"default": PLAIN}, TOKENS))
    reader.start()
    await reader.chat(body())
    await reader.close()
    with pytest.raises(Unavailable):
        await reader.chat(body())
    processes = [process._process for process in reader._processes]
    assert [process for process in processes if process is not None and process.returncode is None] == []


def test_templates_and_tokens_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "rag"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "other", "eos_token": "</s>"}')
    assert ChatTemplates.load(tmp_path) == ChatTemplates({"default": "old", "rag": "rag"}, TOKENS)
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tool")
    assert ChatTemplates.load(tmp_path).sources == {"default": "new", "rag": "rag", "tool_use": "tool"}
    (tmp_path / "own.jinja").write_text("own")
    assert ChatTemplates.load(tmp_path, tmp_path / "own.jinja") == ChatTemplates({"default": "own"}, TOKENS)
    with pytest.raises(ConfigError, match=r"^chat_template: .*none\.jinja"):
        ChatTemplates.load(tmp_path, tmp_path / "none.jinja")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        ChatTemplates.load(tmp_path)


def test_the_demo_models_template_compiles() -> None:
    templates = ChatTemplates.load(demo_model_path())
    assert ChatEnvironment(templates.sources, templates.tokens, 1000).faults == {}
