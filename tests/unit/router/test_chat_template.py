from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from kvrelay_core.errors import ConfigError, InvalidRequestError
from kvrelay_router.chat_template import ChatTemplate, load_chat_template

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": 'say "é"'}]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, now=lambda: datetime(2024, 7, 3)).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% if add_generation_prompt %}A:{% endif %}", "<s>A:"),
        ("{% for m in messages %}\n  {{ m.role }};\n{% endfor %}", "  system;\n  user;\n"),
        ("{{ messages[1].content | tojson }}", '"say \\"é\\""'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "03 Jul 2024"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "be brief"),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "system"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}{{ tools is none }}", "2True"),
    ],
)
def test_what_hub_templates_rely_on(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequestError, match="refuses them: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content.strip() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_break_the_server(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(source)


def test_a_template_that_does_not_compile_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        render("{% for %}")


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    config = {
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}],
        "eos_token": {"content": "</s>"},
    }
    named = load_chat_template(tmp_path, config)
    assert named is not None and named.render(MESSAGES) == "d</s>"
    (tmp_path / "chat_template.jinja").write_text("file")
    from_file = load_chat_template(tmp_path, config)
    assert from_file is not None and from_file.render(MESSAGES) == "file"
