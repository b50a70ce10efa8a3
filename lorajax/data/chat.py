"""Chat templates: messages to the text that a model was taught to read, by its tokenizer's Jinja template.

Rendered as `transformers` does it: jinja2's immutable sandbox, `raise_exception`, `strftime_now`, `{% generation %}`.

::

    template = load_chat_template(folder)                             # or, from a GGUF file:
    template = ChatTemplate(found.chat_template or CHATML, found.special_tokens)
    prompt = template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    examples = supervise([template.marked(messages) for messages in conversations], tokenizer, max_length=512)
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lorajax.data.supervised import Marked

Messages = Sequence[Mapping[str, Any]]
"""A conversation: `role` (system, user, assistant) and `content` of each turn."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a system turn of its own: the default for models that come without a template. Its turns end with
`<|im_end|>`, so `ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})`; best with a tokenizer that has the two markers."""

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_START, _END = "\ue000", "\ue001"  # private use: around what `{% generation %}` holds, in `marked` alone


class NoTemplate(ValueError):
    """A model folder has no chat template, or none of the name."""


@dataclass(frozen=True)
class ChatTemplate:
    """source: the Jinja template. tokens: what it may name beside the messages (`bos_token`, `eos_token`, ...).

    Raises ValueError for an empty source (the model has no template) and for one that is not Jinja.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("this model has no chat template: it was not taught turns. Give the template that it is "
                             "to learn, such as lorajax.data.CHATML, or train on prompts and completions")  # fmt: skip
        _compiled(self.source, False)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as text; with `add_generation_prompt`, up to where the assistant's next turn begins.

        variables: more that the template may name (`tools`, `enable_thinking`, ...).
        Raises ValueError where the template refuses the messages (roles that do not alternate, for one).
        """
        return self._rendered(messages, False, add_generation_prompt=add_generation_prompt, **variables)

    def marked(self, messages: Messages, **variables: Any) -> Marked:
        """The conversation's text with the spans that the assistant said: from where generation would begin to the end
        of the turn, its `eos_token` included and white space behind that not, which no generation reaches.

        Where the template has `{% generation %}`, these are the spans. Raises ValueError without an assistant turn, and
        for a template without that tag whose earlier turns look different once later ones follow.
        """
        if not any(message["role"] == "assistant" for message in messages):
            roles = [message["role"] for message in messages]
            raise ValueError(f"a conversation of {roles} has no assistant turn to learn")
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            return _taken_apart(self._rendered(messages, True, **variables))
        whole, spans = self.render(messages, **variables), []
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before = self.render(messages[:i], add_generation_prompt=True, **variables)
            until = self.render(messages[: i + 1], **variables)
            if not (until.startswith(before) and whole.startswith(until)):
                raise ValueError(
                    f"this chat template renders turn {i} differently when it is generated and when it is past, so "
                    f"where it begins cannot be read off: put {{% generation %}} and {{% endgeneration %}} around what "
                    f"the assistant says in the template"
                )
            turn = until[len(before) :].rstrip()
            eos = self.tokens.get("eos_token")
            spans.append((len(before), len(before) + len(turn) if eos and turn.endswith(eos) else len(until)))
        return Marked(whole, tuple(spans))

    def _rendered(self, messages: Messages, marks: bool, **variables: Any) -> str:
        named = {"tools": None, "documents": None, "add_generation_prompt": False, **self.tokens, **variables}
        try:
            return _compiled(self.source, marks).render(messages=[dict(message) for message in messages], **named)
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(f"the chat template refuses a conversation of {roles}: {error}") from error


def load_chat_template(
    folder: str | os.PathLike[str], *, name: str = "default", default: str | None = None
) -> ChatTemplate:
    """The template of a model folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.

    name: which, where the folder has several. default: the source to take where it has none, such as `CHATML`; its
    turns' end then is the `eos_token`. Raises NoTemplate, a ValueError, where there is none, FileNotFoundError without
    the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    config = _json(folder / "tokenizer_config.json")
    given = {**_json(folder / "special_tokens_map.json"), **config}
    given = {key: value["content"] if isinstance(value, dict) else value for key, value in given.items()
             if key in _TOKENS}  # fmt: skip
    tokens = {key: value for key, value in given.items() if isinstance(value, str)}
    found = config.get("chat_template") or {}
    found = {"default": found} if isinstance(found, str) else found
    sources = {row["name"]: row["template"] for row in found} if isinstance(found, list) else dict(found)
    for file in (*folder.glob("chat_template.jinja"), *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        sources["default" if file.parent == folder else file.stem] = file.read_text(encoding="utf-8")
    if name in sources:
        return ChatTemplate(sources[name], tokens)
    if default is not None and not sources:
        return ChatTemplate(default, tokens | ({"eos_token": "<|im_end|>"} if default == CHATML else {}))
    if sources:
        raise NoTemplate(f"{str(folder)!r} has no chat template {name!r}; it has {', '.join(sorted(sources))}")
    raise NoTemplate(f"{str(folder)!r} has no chat template, neither chat_template.jinja nor in tokenizer_config.json: "
                     f"give default=lorajax.data.CHATML, or train on prompts and completions")  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _taken_apart(text: str) -> Marked:
    """The text without the marks, and where they were."""
    pieces = re.split(f"[{_START}{_END}]", text)
    ends = [len("".join(pieces[:i])) for i in range(1, len(pieces))]
    spans = tuple(zip(ends[::2], ends[1::2], strict=True))
    return Marked("".join(pieces), spans)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what it holds, between marks if the environment has `marks`."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_held"), [], [], body).set_lineno(line)

    def _held(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}" if self.environment.marks else caller()  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=32)
def _compiled(source: str, marks: bool) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.extend(marks=marks)
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not Jinja: {error} (line {error.lineno})") from error


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """Jinja's own escapes what HTML would read."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
