#!/usr/bin/env python3
"""Renders the templates of crates/gd-model/tests/fixtures/chat_templates as transformers renders them, with Jinja2.

    python3 -m venv venv && venv/bin/pip install jinja2 transformers
    venv/bin/python scripts/golden/chat_templates.py

Writes two files beside the templates. `golden.json` is a list of renderings, each with the template (the name of a file,
or its text), the variables as JSON, the turns, and the text, or `null` if Jinja2 reports an error. `masks.json` is a
list of chats with a template and a tokenizer, and the tokens with transformers' mask of those of the assistant.
"""

import json
from datetime import datetime
from pathlib import Path

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

FOLDER = Path(__file__).resolve().parents[2] / "crates/gd-model/tests/fixtures/chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Reports the weather.\nOf a place.",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string", "description": "City, e.g. Köln."},
        "days": {"type": ["integer", "null"], "default": 3, "nullable": True},
        "units": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object", "additionalProperties": {"type": "number"}}},
        "required": ["place"], "additionalProperties": False},
    "return": {"type": "string"}}}
PING = {"type": "function", "function": {"name": "ping", "description": "No arguments.",
                                         "parameters": {"type": "object", "properties": {}, "required": []}}}
VARIABLES = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "tools": [WEATHER, PING]},
    {"tools": [PING], "tools_in_user_message": False, "builtin_tools": ["search", "interpreter", "python"],
     "date_string": "01 Jan 2025", "reasoning_effort": "high", "add_generation_prompt": False},
]
SYSTEMS = [None, " Be brief. /no_think\n"]
USERS = [" Say “hello” to <b>Ann & Bob</b>\n\n", "<result>1</result>"]

# Expressions and statements, one construct each. `x` is the content of the user turn.
SNIPPETS = r"""
{{ none is iterable }} {{ none is none }} {{ nothing is none }} {{ nothing is defined }} {{ nothing is iterable }}
{{ x is iterable }} {{ 5 is iterable }} {{ {} is iterable }} {{ [] is iterable }} {{ true is iterable }} {{ range(2) is iterable }}
{{ x is sequence }} {{ 5 is sequence }} {{ {} is sequence }} {{ messages[1:] is sequence }} {{ none is sequence }}
{{ x is string }} {{ 5 is number }} {{ 5.0 is float }} {{ true is boolean }} {{ 5 is integer }} {{ true is integer }} {{ {} is mapping }}
{{ true is number }} {{ x is mapping }} {{ range is callable }} {{ x is callable }} {{ tools is none }} {{ 1 is odd }} {{ 4 is divisibleby 2 }}
{{ 1 in [1, 2] }} {{ 'a' in 'abc' }} {{ 'k' in {'k': 1} }} {{ 3 not in [1] }} {{ 1 is in [1] }} {{ x is eq x }} {{ 2 is ge 1 }} {{ none is sameas none }}
{{ '%s and %s' % ('a', 1) }} {{ '%d%%' % 50 }} {{ '%05.1f|%-5s|%+d|%x|%r' % (3.14159, 'ab', 4, 255, 'q') }} {{ '%s' % x }} {{ '%s' % [1, 'a'] }}
{{ '%(a)s-%(b)03d' % {'a': 1, 'b': 2} }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7.5 % 2 }} {{ 2 * 3 % 4 }} {{ 10 - 7 % 4 }} {{ '%s' % 'a' + 'b' }} {{ '%s' % none }} {{ '%i%%%u' % (1, 2) }} {{ '%r %s' % (none, 'a') }} {{ '%(a)r'|length }}
{{ '{} {}'.format(1, 'a') }} {{ '{0}{1}{0}'.format('a', 'b') }} {{ '{k:>5}|{v:.2f}'.format(k='x', v=1) }} {{ '%s, %s'|format(1, 'b') }} {{ '%(a)s'|format(a=1) }} {{ '1234567 of %(k1234567)s' % {'k1234567': 2} }} {{ '1234567 {}'.format(1) }} {{ '{:>4}|{:<4}|{:^5}|{:,}'.format(1, 'a', 'b', 12345) }}
{{ 1 + 2 * 3 ** 2 - 4 // 3 }} {{ 7 / 2 }} {{ 6 / 2 }} {{ -7 // 2 }} {{ 2 ** -1 }} {{ 1 ~ 2 ~ none ~ true }} {{ 'a' * 3 }} {{ [1] * 2 + [3] }} {{ (1, 2) + (3,) }}
{{ 1 < 2 < 3 }} {{ not 1 == 2 and 2 }} {{ '' or 'b' }} {{ none and 1 }} {{ 'a' if false }}|{{ 'a' if x else 'b' }} {{ 1 if 0 else 2 if 0 else 3 }}
{{ true }} {{ none }} {{ nothing }} {{ [true, none, 'a', "it's", 1.0] }} {{ {'a': none} }} {{ (1,) }} {{ 1e20 }} {{ 1.5e-7 }} {{ 100000.0 }} {{ 0.1 + 0.2 }}
{{ ' a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ ' a '.lstrip() }}|{{ ' a '.rstrip() }}|{{ 'abc'.rstrip('cb') }}|{{ ' a '|trim }}|{{ 'xax'|trim('x') }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b c '.split() }} {{ 'a b c'.split(' ', 1) }} {{ 'a b c d'.split(none, 2) }} {{ ' a b  c '.rsplit(none, 1) }} {{ ' a b  c '.split(none, 1) }} {{ ' a '.split(none, 0) }} {{ 'a-b-c'.rsplit('-', 1) }} {{ 'a b'.split(maxsplit=1) }} {{ ''.split() }} {{ ''.split(',') }}
{{ 'a\nb\r\nc\n'.splitlines() }} {{ 'a\nb'.splitlines(true) }} {{ 'a\n\nb'.splitlines() }} {{ ''.splitlines() }}
{{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }} {{ 'abc'.partition('x') }} {{ 'abc'.rpartition('x') }} {{ 'prefix-a'.removeprefix('prefix-') }} {{ 'a.b'.removesuffix('.b') }}
{{ 'abcabc'.find('c') }} {{ 'abcabc'.rfind('c') }} {{ 'abc'.find('x') }} {{ 'abcabc'.index('b') }} {{ 'abcabc'.rindex('b') }} {{ 'abcabc'.count('bc') }} {{ 'über'.find('b') }}
{{ 'abc'.startswith('a') }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.endswith('bc') }} {{ 'abc'.endswith(('x', 'bc')) }}
{{ 'hello World'.upper() }} {{ 'HeLLo'.lower() }} {{ 'hello world'.title() }} {{ 'hello World'.capitalize() }} {{ 'aBc'.swapcase() }} {{ 'Straße'.casefold() }}
{{ 'a'.isalpha() }} {{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ ' '.isspace() }} {{ 'A'.isupper() }} {{ 'a'.islower() }} {{ ''.isdigit() }} {{ '1.5'.isnumeric() }}
{{ '7'.zfill(3) }} {{ '-7'.zfill(4) }} {{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '.') }}|{{ 'ab'.center(5, '*') }}|{{ 'a'.center(4, '*') }}
{{ 'aXbXc'.replace('X', '-') }} {{ 'aXbXc'.replace('X', '-', 1) }} {{ ', '.join(['a', 'b']) }} {{ ''.join([]) }} {{ 'aXbXc'|replace('X', '-') }} {{ 'aXbXc'|replace('X', '-', 1) }}
{{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b') }} {{ {'a': 1}.get('b', 2) }} {{ {'b': 1, 'a': 2}.items()|list }} {{ {'b': 1, 'a': 2}.keys()|list }} {{ {'b': 1}.values()|list }} {{ {'a': 1}.copy() }} {{ {'b': 1, 'a': 2}|items|list }}
{{ [3, 1, 2].index(1) }} {{ [1, 1, 2].count(1) }} {{ [1, 2].copy() }} {{ (1, 2, 2).count(2) }}
{{ 'abcdef'[1:3] }} {{ 'abcdef'[-2:] }} {{ 'abcdef'[::2] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }} {{ [1, 2, 3, 4][1:-1] }} {{ [1, 2, 3][::-1] }} {{ 'abc'[5:] }}| {{ [1, 2, 3][:-1]|length }} {{ 'über'[0] }}
{{ [3, 1, 2]|sort }} {{ [3, 1, 2]|sort(reverse=true) }} {{ ['b', 'A']|sort }} {{ [1, 2, 3]|sum }} {{ [1, 5, 2]|max }} {{ [4, 2]|min }} {{ [1, 2]|first }} {{ [1, 2]|last }} {{ [1, 2, 1]|unique|list }} {{ 'abc'|reverse }} {{ [1, 2]|reverse|list }}
{{ messages|map(attribute='role')|join(', ') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('role', 'equalto', 'user')|map(attribute='content')|list }} {{ [1, 2, 3, 4]|select('even')|list }} {{ [0, 1, '']|select|list }} {{ ['a', 'b']|map('upper')|list }}
{{ 'a b c'|wordcount if false else 'skipped' }} {{ 'hello'|length }} {{ [1, 2]|count }} {{ nothing|default('d') }} {{ ''|default('d', true) }} {{ nothing|d('e') }} {{ none|default('f') }}
{{ '3'|int }} {{ 'x'|int(7) }} {{ '3.7'|float }} {{ 3.7|int }} {{ 3.14159|round(2) }} {{ 2.5|round|int }} {{ -3|abs }} {{ 5|string + 'a' }} {{ 'abc'|list }} {{ 'a'|upper }} {{ 'hello world'|title }} {{ 'hello world'|capitalize }}
{{ 'a\nb\n\nc'|indent }}| {{ 'a\nb'|indent(2) }}| {{ 'a\nb'|indent(2, true) }}| {{ 'a\n\nb'|indent(2, blank=true) }}| {{ 'a\nb'|indent(width='> ') }}| {{ 'a\n'|indent }}|
{{ {'b': [1, 2.0, none, true, 'ü"<&>\n'], 'a': {}} | tojson }} {{ [] | tojson }} {{ 'ü' | tojson(ensure_ascii=true) }} {{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }} {{ {'b': 1}|tojson(separators=(',', ':')) }} {{ x|tojson }}
{{ {'b': [1, {'c': []}], 'a': 'x'} | tojson(indent=2) }} {{ [1, [2]]|tojson(indent=4) }} {{ {}|tojson(indent=2) }} {{ {1: 2, none: 3}|tojson }} {{ [(1, 2)]|tojson }} {{ 1e20|tojson }} {{ 'a\x7f\x01'|tojson }}
{{ '<a&"b">'|e }} {{ '<a>'|safe }} {{ '<a>'|escape|length }} {{ ['<b>']|join|e }}
{{ namespace(a=1).a }}{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %} {{ ns.n }} {{ range(5)|list }} {{ range(1, 10, 3)|list }} {{ range(3, 0, -1)|list }} {{ dict(a=1, b=2) }}
{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if loop.nextitem is defined }} {% endfor %}
{% for m in messages if m.role == 'none' %}{{ m }}{% else %}empty{% endfor %} {% for c in 'ab' %}{{ c }}.{% endfor %} {% for k in {'b': 1, 'a': 2} %}{{ k }}{% endfor %} {% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}
{% set a, b = 1, 'x' %}{{ a }}{{ b }} {% set c = (1, 2) %}{{ c[1] }} {% with d = 5 %}{{ d }}{% endwith %} {% if 0 %}{% elif '' %}{% else %}else{% endif %} {% set e %}block {{ a }}{% endset %}{{ e|upper }}
{% for i in range(2) %}{% set inner = i %}{% endfor %}{{ inner is defined }} {% if true %}{% set leaked = 1 %}{% endif %}{{ leaked }} {% generation %}{% set hidden = 1 %}g{% endgeneration %}{{ hidden is defined }}
{% macro m(a, b='d', c=none) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, c=2) }} {{ m(b=3, a=4) }} {{ m('x')|upper }} {% macro n() %}{{ caller() }}!{% endmacro %}{% call n() %}called{% endcall %}
{% raw %}{{ a % b }}{% generation %}{% endraw %} {# {{ a % b }} #}{{ '{{ "%s" % 1 }}' }} {{ "a" "b" }} {{ 'it''s' }} {{ '\n\t\\\'"' }} {{ "\u00fc\x41" }}
{{- ' a ' -}} x {{ '}}' }} {{ '%}' }} {{ {'a': {'b': {}}} }} {{ [[1, [2]]][0][1][0] }} {{ {'a b': 1}['a b'] }} {{ messages[0]['content'][0:2] }} {{ messages[-1].role }} {{ messages.0.role }}
{%- if true -%} trimmed {%- endif -%} | {%- for i in [1] %} {{ i }} {% endfor -%} | {% if true %}  kept  {% endif %}
{{ x.nothing is defined }} {{ messages[0].nothing is defined }} {{ messages[0]['nothing'] is defined }} {{ messages[5] is defined }} {{ messages[0].get('nothing') is none }} {{ (messages|first).role }} {{ (messages[0].nothing or 'd') }}
{{ 1 == true }} {{ 'a' == 1 }} {{ [1] == [1.0] }} {{ none == false }} {{ '' == none }} {{ 'a' < 'b' }} {{ {'a': 1} == {'a': 1} }} {{ (1, 2) == [1, 2] }} {{ '3.7'|int }} {{ true + 1 }}
{{ messages|sort(attribute='role')|map(attribute='role')|list }} {{ {'a': 2, 'b': 1}|dictsort(by='value') }} {{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }} {{ [[1, 2], [3]]|sum(start=[]) }} {{ [1, 2, 3]|slice(2)|list }}
{% set ns = namespace() %}{% set ns.text %}in {{ 7 % 4 }}{% endset %}{{ ns.text }} {% set ns.a, b = 1, 2 %}{{ b }} {% set ns.t = 1, 'a' %}{{ ns.t }} {% set t = 1, %}{{ t }}
{{ raise_exception('stop') }}
{{ nothing.attribute }}
{{ 1 + 'a' }}
{{ [1].append(2) }}
{{ {'a': 1}.update({'b': 2}) }}
{{ {'a': 1}.pop('a') }}
{{ 'abc'.index('x') }}
{{ [1].index(2) }}
{{ 1 / 0 }}
{{ 1 % 0 }}
{{ ''.join([1]) }}
{{ 'a'.nothing() }}
{{ '%d' % 'a' }}
{{ '%s' % (1, 2) }}
{{ 'a' % 1 }}
{{ '%s %s' % 1 }}
{{ undefined_function() }}
{{ x | undefined_filter }}
{% if %}
{% generation %}
{{ 'open
{% for x in [1] %}
"""


# Templates with generation blocks: white space, macros, several blocks in a turn, none for some of the messages.
GENERATION = [
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}",
    "{%- for m in messages %}\n<|{{ m.role }}|>\n  {%- if m.role == 'assistant' %}\n  {%- generation -%}\n  "
    "{{ m.content | trim }}\n  {%- endgeneration %}\n{{ eos_token }}\n  {%- else %}{{ m.content }}{% endif %}\n{%- endfor %}",
    "{% macro turn(m) %}{% generation %}\n{{ m.content }}\n{% endgeneration %}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) if m.role == 'assistant' else m.content + ':' }}{% endfor %}",
    "{% for m in messages %}{{ m.role[0] }} {% if loop.last %}{% generation %}{{ m.content[:3] }}{% endgeneration %} and "
    "{% generation %}{{ m.content[3:] }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
]
CHATS = [
    [("user", "What is 2?"), ("assistant", "A number.")],
    [("system", "Be brief."), ("user", "Über “é”?"), ("assistant", " É, ü and \n more. "), ("user", "🙂"),
     ("assistant", "🙂 yes")],
    [("user", "Alone")],
    [("user", "An empty answer"), ("assistant", "")],
]


class Generation(Extension):
    """`{% generation %}` blocks, which transformers uses to find the tokens of the assistant. They have a scope."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_render", []), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(env, text, variables, system, user):
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": user})
    values = {"tools": None, "documents": None, "add_generation_prompt": True} | TOKENS | variables
    try:
        return env.from_string(text).render(messages=messages, **values)
    except Exception:
        return None


def masks():
    from transformers import PreTrainedTokenizerFast

    cases = []
    for family in ["llama", "qwen3"]:
        path = f"tests/fixtures/llama/{family}/tokenizer.json"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(FOLDER.parents[4] / path))
        for template in GENERATION:
            for chat in CHATS:
                messages = [{"role": role, "content": content} for role, content in chat]
                out = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True,
                                                    return_assistant_tokens_mask=True, **TOKENS)
                record = json.dumps({"messages": messages}, ensure_ascii=False)
                cases.append(dict(tokenizer=path, template=template, record=record, ids=out["input_ids"],
                                  mask=out["assistant_masks"]))
    (FOLDER / "masks.json").write_text(json.dumps(cases, ensure_ascii=False, indent=0).replace(",\n", ", ") + "\n")
    print(f"{len(cases)} masks, {sum(any(case['mask']) for case in cases)} of them with tokens of the assistant")


def main():
    env, cases = environment(), []
    for file in sorted(FOLDER.glob("*.jinja")):
        text = file.read_text()
        for variables in VARIABLES:
            for system in SYSTEMS:
                for user in USERS:
                    rendered = render(env, text, variables, system, user)
                    cases.append(dict(file=file.name, variables=json.dumps(variables, ensure_ascii=False),
                                      system=system, user=user, text=rendered))
    for line in SNIPPETS.strip("\n").split("\n"):
        # A line that is a list of expressions is a case for each of them.
        statements = "{%" in line or "{#" in line or not line.startswith("{{ ")
        for template in [line] if statements else line.replace("}} {{", "}}\0{{").split("\0"):
            variables = {"x": "Hi <b>"}
            rendered = render(env, template, variables, "Be brief.", "Hi <b>")
            cases.append(dict(template=template, variables=json.dumps(variables), system="Be brief.", user="Hi <b>",
                              text=rendered))
    (FOLDER / "golden.json").write_text(json.dumps(cases, ensure_ascii=False, indent=0) + "\n")
    failed = sum(case["text"] is None for case in cases)
    print(f"{len(cases)} renderings, of which {failed} are errors")
    masks()


if __name__ == "__main__":
    main()
