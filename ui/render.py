"""What a turn looks like: Markdown made safe, the line of figures under an answer, notices, the preparation panel.

Nothing the model or the user wrote reaches the page as HTML: `<` opens no tag outside of code, pictures become links,
and what is left goes through Gradio's sanitiser. Pure functions from records to text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from ui.client import Readiness
from ui.conversation import Turn, TurnStatus

__all__ = [
    "chatbot_messages",
    "plain_prompt",
    "progress_panel",
    "safe_markdown",
    "stats_line",
    "status_pill",
    "turn_index_of",
]

# No tag begins with "<" and this character, which is not seen. "&lt;" would be seen when a message is copied or edited.
_BREAK = "\u200b"

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def safe_markdown(text: str) -> str:
    """The same Markdown with no raw HTML and no pictures in it; code is left as it is.

    A best effort for what is shown. The page's safety rests on the sanitiser and the content security policy.
    """
    lines: list[str] = []
    fence: str | None = None
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if fence is None and match and not ("`" in match[1] and "`" in match[2]):
            fence = match[1]
            # The word after the fence becomes a class name and may switch on a renderer: letters and digits only.
            line = line[: match.end(1)] + re.sub(r"[^\w+#.-].*|^mermaid$", "", match[2].strip())
        elif fence is not None:
            if match and match[1].startswith(fence) and not match[2].strip():
                fence = None
        else:
            line = _escape_prose(line)
        lines.append(line)
    if fence is not None:
        lines.append(fence)  # still streaming: close it, so that what follows is not code
    return "\n".join(lines)


def _escape_prose(line: str) -> str:
    pieces: list[str] = []
    position = 0
    for code in _INLINE_CODE.finditer(line):
        pieces += [_escape_text(line[position : code.start()]), code[0]]
        position = code.end()
    return "".join([*pieces, _escape_text(line[position:])])


def _escape_text(text: str) -> str:
    return text.replace("<", "<" + _BREAK).replace("![", "[")


def plain_prompt(text: str) -> str:
    """What was typed, from a prompt as it was shown: Gradio hands the shown text to its editor."""
    return text.replace(_BREAK, "")


def stats_line(turn: Turn) -> str:
    parts: list[str] = []
    if turn.stats is not None:
        parts.append(f"first token {_seconds(turn.stats.first_token_s)}")
        if turn.stats.tokens_per_s is not None:
            parts.append(f"{turn.stats.tokens_per_s:.1f} tokens/s")
        if turn.status is not TurnStatus.RUNNING:
            parts.append("1 token" if turn.stats.tokens == 1 else f"{turn.stats.tokens:,} tokens")
    if turn.status is TurnStatus.STOPPED:
        parts.append("stopped")
    elif turn.status is TurnStatus.CUT:
        parts.append("reached the length limit")
    return " · ".join(parts)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def chatbot_messages(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Two messages a turn, in the shape of `gr.Chatbot`; `turn_index_of` relies on the two."""
    messages: list[dict[str, object]] = []
    for turn in turns:
        messages.append({"role": "user", "content": [_text(safe_markdown(turn.prompt))]})
        messages.append({"role": "assistant", "content": _answer_parts(turn)})
    return messages


def turn_index_of(message_index: int) -> int:
    return message_index // 2


def _answer_parts(turn: Turn) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    if turn.answer:
        parts.append(_text(safe_markdown(turn.answer)))
    elif turn.status is TurnStatus.RUNNING:
        parts.append(_text('<span class="causerie-waiting">Thinking…</span>'))
    if turn.notice:
        kind = "refused" if turn.status is TurnStatus.REFUSED else "failed"
        parts.append(_text(f'<div class="causerie-notice {kind}">{html.escape(turn.notice)}</div>'))
    if line := stats_line(turn):
        parts.append(_text(f'<div class="causerie-stats">{html.escape(line)}</div>'))
    return parts


def _text(text: str) -> dict[str, str]:
    # A dict, not a string: Gradio strips the indentation of plain strings.
    return {"type": "text", "text": text}


def status_pill(model: str, readiness: Readiness | None) -> str:
    """`readiness` None: the server cannot be reached."""
    if readiness is None:
        state, label = "down", "server not reachable"
    elif readiness.ready:
        state, label = "ready", model
    else:
        state, label = "busy", "getting ready"
    return f'<div class="causerie-pill {state}" role="status"><i></i><span>{html.escape(label)}</span></div>'


def progress_panel(readiness: Readiness) -> str:
    """What the server is waiting for, with a bar; the bar only moves back and forth while the share is unknown."""
    stage = readiness.stage or "Starting"
    fraction = readiness.fraction
    if readiness.error:
        return (
            '<div class="causerie-preparing failed" role="alert"><h2>The model could not be prepared</h2>'
            f"<p>{html.escape(readiness.error)}</p></div>"
        )
    percent = "" if fraction is None else f"{fraction:.0%}"
    bar = '<b class="unknown"></b>' if fraction is None else f'<b style="width:{fraction:.1%}"></b>'
    value = "" if fraction is None else f' aria-valuenow="{fraction * 100:.0f}"'
    return (
        '<div class="causerie-preparing"><h2>Getting the model ready</h2>'
        f'<p class="stage" role="status"><span>{html.escape(stage)}</span><span>{percent}</span></p>'
        f'<div class="bar" role="progressbar" aria-label="Preparation" aria-valuemin="0" aria-valuemax="100"{value}>'
        f"{bar}</div>"
        "<p>This happens once and can take a few minutes. The chat opens by itself when it is done.</p></div>"
    )
