"""Chat messages become a prompt by the model's own template, as Hugging Face renders them.

https://huggingface.co/docs/transformers/chat_templating

Templates come with the model's files and are programs, so they run in a sandbox that lets them change nothing and reach
no attribute with an underscore. Clients send messages, never templates.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdmesh.errors import ConfigError, InvalidRequestError


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special_tokens: What the template may name: "bos_token", "eos_token", ….
        where: The model's files, as error messages name them.

    Raises:
        ConfigError: if the template is no valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"{where}: the chat template is no valid Jinja ({error}): get the files anew") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for `messages` ({"role", "content"} each), ready for the assistant's answer.

        Raises InvalidRequestError where the template refuses them, e.g. for the order of their roles.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}",
                reason="CHAT_TEMPLATE_REFUSED",
                stage="admission",
            ) from error


class _GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's words for training; here only what it holds counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
