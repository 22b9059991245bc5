"""Prompts as a model was trained to read them: chat templates, in a sandbox.

A template is code that came with somebody's weights. It runs in jinja2's immutable sandbox (no
attributes that start with an underscore, no changes to its arguments) with a budget of steps.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

if TYPE_CHECKING:
    from kdrl_jax.data.tokenizer import Tokenizer

ChatMode = Literal["auto", "none"]

MAX_STEPS = 100_000
"""Loop turns and calls a template may use for one prompt; published templates use some dozens."""
MAX_CHARS = 1_000_000
"""Longest string (or list) a template may make by multiplying, padding or rendering."""

# Templates that write the date get this one: a prompt must not change at midnight or on resume.
_DATE = datetime.datetime(2025, 1, 1)
# Stands for the question where the template's own words are encoded apart from it. Private-use
# characters: they are in no template and in no vocabulary.
_QUESTION_MARK = "\ue000\ue001\ue000"


def render_prompt(tokenizer: "Tokenizer", question: str, template: str, chat: ChatMode) -> list[int]:
    """Token ids of a prompt, ready for a completion to follow.

    With a chat template the prompt is one user message and the opening of the answer, encoded as the
    template writes it (a BOS is there if the template puts one). Without, it is the user's message after
    the tokenizer's BOS, if it has one. Strings of special tokens inside the question stay text.

    Args:
        tokenizer: encodes, and holds the chat template.
        question: the question as the data has it.
        template: the user's message with `{question}` where the question goes.
        chat: `auto` uses the tokenizer's chat template if it has one; `none` never does.

    Raises:
        ValueError: an empty prompt, a character the tokenizer lacks, or a template that fails.
    """
    message = template.replace("{question}", question)
    if chat == "none" or tokenizer.chat_template is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = bos + tokenizer.encode(message)
    else:
        ids = _encode_chat(tokenizer, tokenizer.chat_template, message)
    if not ids:
        raise ValueError(
            f"the prompt for question {question[:60]!r} has no tokens; check data.prompt_template"
        )
    return ids


def _encode_chat(tokenizer: "Tokenizer", chat_template: str, message: str) -> list[int]:
    def render(content: str) -> str:
        return render_chat(chat_template, [{"role": "user", "content": content}], tokenizer.template_tokens)

    if not any(string in message for string in tokenizer.special_strings):
        return tokenizer.encode(render(message), special=True)
    # The message spells a special token. Encoded whole it would become that token (a question could end
    # its own turn), so the message is encoded apart from the template's words.
    around = render(_QUESTION_MARK).split(_QUESTION_MARK)
    if len(around) == 1:
        raise ValueError(
            "the chat template leaves the user's message out; set tokenizer.chat_template to 'none'"
        )
    ids = tokenizer.encode(around[0], special=True)
    for after in around[1:]:
        ids += tokenizer.encode(message) + tokenizer.encode(after, special=True)
    return ids


def render_chat(chat_template: str, messages: list[dict[str, str]], tokens: Mapping[str, str]) -> str:
    """A chat template rendered as Hugging Face does, with the opening of the assistant's turn.

    Args:
        chat_template: jinja source.
        messages: `role` and `content` of each.
        tokens: further variables (`bos_token`, ...).

    Raises:
        ValueError: a template that does not parse, fails, leaves the sandbox or takes too long.
    """
    environment, template = _compile(chat_template)
    environment.steps_left = MAX_STEPS
    # `tools` and `documents` are None, not undefined: templates test them in both ways.
    variables = {
        **tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**variables):
            size += len(piece)
            _check_size(size)
            pieces.append(piece)
    except SecurityError as error:
        raise _unusable(f"is not allowed to do what it does: {error}") from None
    except jinja2.TemplateError as error:
        raise _unusable(f"failed: {error}") from None
    except RecursionError:
        raise _unusable("calls itself without end") from None
    except Exception as error:
        # Template code raises what Python code raises; the type is part of the message.
        raise _unusable(f"failed: {type(error).__name__}: {error}") from error
    return "".join(pieces)


def _unusable(what: str) -> ValueError:
    return ValueError(
        f"the tokenizer's chat template {what}. Mend it, or set tokenizer.chat_template to 'none' and write "
        "the prompt's form in data.prompt_template"
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words; here it only holds them."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` whose attributes cannot pose as Python's own (`__call__`, `__html__`, ...)."""

    def __init__(self, *args: Any, **kwargs: Any):
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget: loop turns and calls are counted, and operators make nothing huge.

    Methods that format (`"%9999999s" % 1`) are not bounded: a template can waste memory, not more.
    """

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.steps_left = MAX_STEPS
        self.filters.update(tojson=_tojson, counted=self._counted, bounded=_bounded)
        del self.globals["lipsum"]
        self.globals.update(
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
            namespace=_Namespace,
            raise_exception=_raise_exception,
            strftime_now=_DATE.strftime,
        )

    def _count(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"more than {MAX_STEPS:,} loop turns and calls for one prompt")

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._count()
            yield item

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes, macros included."""
        self._count()
        return super().call(*args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that make something big out of something small."""
        if operator == "**":
            raise SecurityError("'**' is not available")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                    _check_size(len(sized) * times)
        return _bounded(super().call_binop(context, operator, left, right))


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> tuple[_Environment, jinja2.Template]:
    environment = _Environment()
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "counted")
        # `~` doubles what a variable holds as `+` does; it grows nothing unless it is assigned.
        for assign in tree.find_all(jinja2.nodes.Assign):
            assign.node = _filtered(assign.node, "bounded")
        return environment, environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise _unusable(f"is broken at line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise _unusable("is nested too deeply") from None


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the underscore is reserved")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"a text or list of {size:,} items; the limit is {MAX_CHARS:,}")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        _check_size(len(value))
    return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which prompts do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
