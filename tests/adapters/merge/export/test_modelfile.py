"""Templates in Ollama's language, by hand; what cannot be said in it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from jinja2 import Environment

from adapters.errors import NotExportable
from adapters.merge.export.modelfile import Render, modelfile, rendering, take_apart

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% else %}{{ raise('no system here') }}{% endif %}"
    "{% endfor %}"
)


def render(template: str) -> Render:
    return rendering(Tokenizer(template))


class Tokenizer:
    """As much of one as a rendering needs."""

    bos_token, bos_token_id = "<s>", 1

    def __init__(self, template: str) -> None:
        environment = Environment()
        environment.globals["raise"] = self._raise
        self._template = environment.from_string(template)

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": [1, 2]})

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    @staticmethod
    def _raise(message: str) -> None:
        from jinja2 import TemplateError

        raise TemplateError(message)


def test_chatml_with_a_system_message_of_its_own() -> None:
    assert modelfile("model.gguf", take_apart(render(CHATML)), ["<|im_end|>", "<|endoftext|>"]) == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'SYSTEM """Be kind."""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
    )


def test_the_token_that_begins_every_text_is_not_said_twice_and_a_template_may_know_no_system_message() -> None:
    parts = take_apart(render(INSTRUCT))
    assert parts.system is None
    assert modelfile("model.gguf", parts, ["</s>"]) == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]'
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\n'
    )


def test_braces_of_the_template_are_no_program() -> None:
    made = modelfile(
        "m.gguf", take_apart(render("{% for m in messages %}{{ '{{' }}{{ m['content'] }};{% endfor %}")), []
    )
    assert '{{ "{{" }}{{ .Content }};' in made


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | length }}\n{% endfor %}",
            "changes what a message says",
        ),
        ("{% for m in messages %}{{ loop.index }}. {{ m['content'] }}\n{% endfor %}", "changes what a message says"),
        ("{% for m in messages %}{{ m['content'] }}{% if loop.index > 4 %}!{% endif %}\n{% endfor %}", "more in it"),
        ('{% for m in messages %}"""{{ m["content"] }}{% endfor %}', "quotation marks"),
    ],
)
def test_a_template_that_does_more_is_refused(template: str, says: str) -> None:
    with pytest.raises(NotExportable, match=says) as refused:
        modelfile("m.gguf", take_apart(render(template)), [])
    assert refused.value.code == "unknown_template"
