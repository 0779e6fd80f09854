"""The chat template of one variant: messages to the text that the model was trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import msgspec
from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from polymoe.errors import BundleError, RequestError
from polymoe.text.control_tokens import ControlTokens

ContentFormat = Literal["string", "openai"]
Message = dict[str, Any]

_PROBE = "polymoe probe"  # nothing that a template would write by itself
# What transformers' `apply_chat_template` understands itself; all else is for the template.
_RESERVED = frozenset(
    {
        "messages", "self", "conversation", "chat_template", "tokenize", "sanitize_control_tokens", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip


class TemplateSource(msgspec.Struct, frozen=True):
    """Everything that a chat template depends on: it can be sent to the process that renders."""

    jinja: str
    special_tokens: dict[str, Any] = {}  # name that the template knows -> token: bos_token and others
    added_tokens: dict[str, bool] = {}  # token -> whether it is special


class ChatTemplate:
    """`render` turns messages into text, ready for the assistant's turn.

    A template is a program from a checkpoint: it runs in Jinja's sandbox, which limits what it reaches, not what it
    uses. Where others wait for the answer, `RenderPool` runs it in a process that can be killed.

    Raises `BundleError` where the source is not Jinja.
    """

    def __init__(self, source: TemplateSource) -> None:
        self.source = source
        self._ast = _parse(source.jinja)
        self._control = ControlTokens(source.added_tokens, _literals(self._ast))

    @cached_property
    def content_format(self) -> ContentFormat:
        """Whether the template reads a message's content as a text or as a list of parts.

        The form that shows up in what it renders, tried with both. Where it knows both, or the trial is refused, a list
        if it iterates over the content, as in vLLM.
        """
        text, parts = self._shows("string"), self._shows("openai")
        if text == parts:
            parts = next(_loops_over_content(self._ast), None) is not None
        return "openai" if parts else "string"

    def trial(self) -> tuple[str, str | None]:
        """Render the first that works of conversations that a chat model should know.

        Returns: (text, what is odd about it, for a warning). Raises `BundleError` when none can be rendered.
        """
        failures: list[str] = []
        refusals = 0
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
            try:
                text = self._render([{"role": role, "content": _PROBE} for role in roles], {})
            except Exception as error:
                refusals += type(error) is TemplateError  # what a template's own raise_exception raises
                failures.append(f"{type(error).__name__}: {error}"[:200])
            else:
                return text, None if _PROBE in text else "its chat template leaves out what the user says."
        if refusals < len(failures):
            raise BundleError(f"it cannot render a conversation, {failures[0]}")
        return "", f"its chat template refuses plain conversations ({failures[0]})."

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Args: messages: role, and content as a text, a list of text parts or None. variables: what the template may
        read besides (`chat_template_kwargs`).

        Control tokens that the messages spell out are marked in the text, for `split_marked`.

        Raises `RequestError` for variables that are not the client's to set, and when the template refuses.
        """
        if taken := sorted(_RESERVED & set(variables or ())):
            raise RequestError(f"chat_template_kwargs cannot set {taken[0]}.", param="chat_template_kwargs")
        try:
            return self._render(messages, variables or {})
        except TemplateError as error:
            raise RequestError(
                f"The chat template refused the messages: {str(error)[:200]}", param="messages"
            ) from error
        except Exception as error:  # a template is a program: any error in it is caused by these messages
            raise RequestError(
                f"The chat template cannot render the messages ({type(error).__name__}).", param="messages"
            ) from error

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        return self._apply_in(self.content_format, messages, variables)

    def _apply_in(self, form: ContentFormat, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        shape = _as_text if form == "string" else _as_parts
        shaped = [{**message, "content": shape(message["content"])} for message in messages]
        options = {"add_generation_prompt": True, **self.source.special_tokens, **self._control.mark(variables)}
        return str(_apply(self.source.jinja, self._control.mark_messages(shaped), options))

    def _shows(self, form: ContentFormat) -> bool:
        try:
            text = self._apply_in(form, [{"role": "user", "content": _PROBE}], {})
            return _PROBE in text and "'type'" not in text  # a list that is merely printed is not understood
        except Exception:  # it is tried with what it may not be made for
            return False


def _apply(jinja: str, messages: list[Message], options: Mapping[str, Any]) -> str:
    """As the tokenizers' `apply_chat_template` does it, which leaves out what is None."""
    from transformers.utils.chat_template_utils import render_jinja_template

    kept = [{name: value for name, value in message.items() if value is not None} for message in messages]
    texts, _ = render_jinja_template([kept], chat_template=jinja, **options)
    return str(texts[0])


def _as_text(content: str | list[dict[str, Any]] | None) -> str:
    """Several parts become lines, as in vLLM; an assistant's turn may have no content."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


def _as_parts(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def _parse(source: str) -> nodes.Template:
    """With transformers' environment, which knows its own tags. Raises `BundleError`."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree: nodes.Template = _compile_jinja_template(source).environment.parse(source)
    except TemplateSyntaxError as error:
        raise BundleError(f"line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise BundleError(str(error)) from error
    return tree


def _literals(tree: nodes.Template) -> str:
    """Everything that the template itself may write, separated so that no token reaches from one to the next."""
    data = {node.data for node in tree.find_all(nodes.TemplateData)}
    return "\0".join(data | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


# How vLLM finds the shape: follow `messages` through assignments to the loops over it, and the message of such a loop
# to a loop over its content.


def _loops_over_content(tree: nodes.Template) -> Iterator[nodes.For]:
    messages = {"messages"} | _aliases(tree, lambda node: _is_name(node, {"messages"}), set())
    turns = _loop_variables(tree, lambda node: _is_name(node, messages))
    turns |= _aliases(tree, lambda node: _is_element(node, messages), set())
    contents = _aliases(tree, lambda node: _is_content(node, turns), set())
    for loop in tree.find_all(nodes.For):
        if _is_content(_plain(loop.iter), turns) or _is_name(_plain(loop.iter), contents):
            yield loop


def _aliases(tree: nodes.Template, matches: Callable[[nodes.Node], bool], known: set[str]) -> set[str]:
    """Names that something which matches is assigned to, directly or through other such names."""
    found = set(known)
    while True:
        new = {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name)
            and (matches(_plain(assign.node)) or _is_name(_plain(assign.node), found))
        }
        if new <= found:
            return found
        found |= new


def _loop_variables(tree: nodes.Template, matches: Callable[[nodes.Node], bool]) -> set[str]:
    loops = (loop for loop in tree.find_all(nodes.For) if matches(_plain(loop.iter)))
    return {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}


def _plain(node: nodes.Node) -> nodes.Node:
    """Without filters, tests and slices around it: `messages[1:] | list` is `messages`."""
    while (inner := _wrapped(node)) is not None:
        node = inner
    return node


def _wrapped(node: nodes.Node) -> nodes.Node | None:
    if isinstance(node, nodes.Filter | nodes.Test):
        return node.node
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return node.node
    return None


def _is_name(node: nodes.Node, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _is_element(node: nodes.Node, names: set[str]) -> bool:
    """`messages[0]`."""
    return isinstance(node, nodes.Getitem) and _is_name(_plain(node.node), names)


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """`message.content` or `message["content"]`."""
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
    else:
        key = node.attr if isinstance(node, nodes.Getattr) else None
    return key == "content" and isinstance(node, nodes.Getitem | nodes.Getattr) and _is_name(node.node, names)
