"""An Ollama Modelfile beside a GGUF file: the template in Ollama's own language, and every token that ends an answer.

Ollama has a template only for models that it recognises; for others the model is asked in a form that it never saw, and
does not stop. So the template is translated by what it does: rendered around marks and taken apart at them. What comes
out is put together again and compared; a template that does more than put words around messages is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import NotExportable

Message = Mapping[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an answer is to follow, into text."""
TRIED = ("user", "system user", "user assistant user", "system user assistant user assistant user")


@dataclass(frozen=True)
class Around:
    before: str
    after: str

    def put(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"


@dataclass(frozen=True)
class ChatParts:
    """What a template puts around each message."""

    system: Around | None
    """None: the template takes no system message."""
    user: Around
    assistant: Around
    answer: str
    """What an answer follows."""
    default_system: str
    """The whole block where no system message is given."""

    def rendered(self, messages: Sequence[Message]) -> str:
        first = messages[0]["role"] == "system"
        text = "" if first else self.default_system
        return text + "".join(self._around(each).put(each["content"]) for each in messages) + self.answer

    def _around(self, message: Message) -> Around:
        found: Around = getattr(self, message["role"])
        return found


def rendering(tokenizer: Any) -> Render:
    """Without the token that is put before every text anyway."""
    from jinja2 import TemplateError

    begins = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""

    def render(messages: Sequence[Message], answer: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except TemplateError as error:
            roles = " ".join(message["role"] for message in messages)
            raise _untranslatable(f"it takes no chat of {roles}: {error}") from error
        return str(text).removeprefix(begins or "")

    return render


def take_apart(render: Render) -> ChatParts:
    """Raises NotExportable."""
    try:
        parts = _parts(render)
    except ValueError as error:
        raise _untranslatable("it changes what a message says, or leaves it out") from error
    for roles in TRIED:
        chat = _chat(roles)
        if parts.system is None and chat[0]["role"] == "system":
            continue
        if parts.rendered(chat) != render(chat, True):
            raise _untranslatable(f"a chat of {roles.replace(' ', ', ')} has more in it than words around each message")
    return parts


def modelfile(file: str, parts: ChatParts, ends: Sequence[str]) -> str:
    """`ends`: the texts of tokens that end an answer."""
    template = "".join(_template(parts))
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    if said := _default_text(parts):
        lines.append(f'SYSTEM """{said}"""')
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    if any('"""' in text for text in (template, said)) or any('"' in end for end in ends):
        raise _untranslatable("it has quotation marks that a Modelfile cannot hold")
    return "\n".join(lines) + "\n"


def _parts(render: Render) -> ChatParts:
    """Raises ValueError where a mark does not come out as it went in."""
    alone, asked = render(_chat("user"), False), render(_chat("user"), True)
    head, after_user = _split(alone, _mark(0))
    _, tail = _split(asked, _mark(0))
    _, after_assistant = _split(render(_chat("user assistant"), False), _mark(1))
    _, rest = _split(render(_chat("user assistant user"), False), _mark(0))
    between, rest = _split(rest, _mark(1))
    second, _ = _split(rest, _mark(2))
    user = Around(_without(second, after_assistant), after_user)
    return ChatParts(
        system=_system(render, user),
        user=user,
        assistant=Around(_without(between, after_user), after_assistant),
        answer=_without(tail, after_user),
        default_system=head[: len(head) - len(user.before)] if head.endswith(user.before) else _fail(),
    )


def _system(render: Render, user: Around) -> Around | None:
    try:
        given = render(_chat("system user"), False)
    except NotExportable:
        return None
    before, rest = _split(given, _mark(0))
    between, _ = _split(rest, _mark(1))
    return Around(before, between[: len(between) - len(user.before)] if between.endswith(user.before) else _fail())


def _chat(roles: str) -> list[Message]:
    return [{"role": role, "content": _mark(place)} for place, role in enumerate(roles.split())]


def _mark(place: int) -> str:
    return f"⟪{place}⟫"


def _split(text: str, mark: str) -> tuple[str, str]:
    before, after = text.split(mark)
    return before, after


def _without(text: str, prefix: str) -> str:
    return text[len(prefix) :] if text.startswith(prefix) else _fail()


def _fail() -> Any:
    raise ValueError


def _template(parts: ChatParts) -> Sequence[str]:
    """In Go's language, without its marks that eat white space."""
    default = _literal(parts.default_system) if parts.default_system and not _default_text(parts) else ""
    system: list[str] = [default]
    if parts.system is not None:
        wanted = _around(parts.system, "{{ .System }}")
        system = ["{{ if .System }}", wanted, *(["{{ else }}", default] if default else []), "{{ end }}"]
    return [
        *system,
        "{{ range .Messages }}",
        '{{ if eq .Role "user" }}',
        _around(parts.user, "{{ .Content }}"),
        '{{ else if eq .Role "assistant" }}',
        _around(parts.assistant, "{{ .Content }}"),
        "{{ end }}{{ end }}",
        _literal(parts.answer),
    ]


def _around(around: Around, inner: str) -> str:
    return f"{_literal(around.before)}{inner}{_literal(around.after)}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _default_text(parts: ChatParts) -> str:
    """What the model is told where nobody says anything, if that is a system message like any other."""
    around, block = parts.system, parts.default_system
    if around is None or not block.startswith(around.before) or not block.endswith(around.after):
        return ""
    return block[len(around.before) : len(block) - len(around.after)]


def _untranslatable(reason: str) -> NotExportable:
    return NotExportable(
        f"the chat template cannot be written in Ollama's language: {reason}. Leave --ollama out and write the "
        "Modelfile by hand; the GGUF file holds the template itself",
        code="unknown_template",
    )
