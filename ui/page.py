"""What the chat page does: one method for each thing a user can do, and the wiring to the components.

A callback reads what the browser keeps (chats, settings), speaks to the API through `ui.client` with the visitor's own
credentials, and returns what to show. It keeps nothing of a conversation between two callbacks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

import gradio as gr

from ui.client import ApiClient, ApiProblem, ProblemKind, Readiness
from ui.conversation import (
    History,
    Turn,
    TurnStatus,
    history_from_json,
    history_to_json,
    messages_to_send,
)
from ui.layout import PageParts, build_layout
from ui.render import chatbot_messages, plain_prompt, progress_panel, status_pill, turn_index_of
from ui.settings import Settings
from ui.turn import RunningTurns, run_turn

__all__ = ["ChatPage", "build_page"]

# A narrow screen has room for the sidebar or the chat.
NARROW = "window.innerWidth < 768"
OPEN_SIDEBAR_IF_WIDE = f"() => ({{ open: !({NARROW}), __type__: 'update' }})"

ASK_BEFORE_DELETING = "() => window.confirm('Delete this chat? It is kept nowhere else.')"

Updates: TypeAlias = list[Any]  # one entry for each output component, as Gradio takes them
Stream: TypeAlias = AsyncGenerator[Updates, None]

# For each output of a turn. A callback that yields nothing would empty them, the stored chats among them.
NO_CHANGE: Updates = [gr.skip()] * 5


class ChatPage:
    def __init__(self, api: ApiClient) -> None:
        self._api = api
        self._running = RunningTurns()
        self._model = ""

    # Chats: each returns what `_view` shows.

    def load(self, stored_history: object, stored_settings: object) -> Updates:
        view = _view(_history(stored_history))
        settings = Settings.from_json(stored_settings)
        fields = [*settings.as_list(), *show_custom(settings.is_custom)]
        # Gradio keeps an update of a folded field until it is unfolded, and may then put it over what is typed first.
        return [*view, *(gr.skip() for _ in fields)] if settings == Settings() else [*view, *fields]

    def new_chat(self, stored_history: object) -> Updates:
        return _view(_history(stored_history).opened(_new_id()))

    def open_chat(self, chosen_id: str, stored_history: object) -> Updates:
        return _view(_history(stored_history).opened(chosen_id))

    async def confirm_delete(self, request: gr.Request, is_confirmed: bool) -> bool:
        if is_confirmed:
            await self.stop(request)
        return is_confirmed

    def delete_chat(self, is_confirmed: bool, stored_history: object) -> Updates:
        history = _history(stored_history)
        if not is_confirmed:
            return NO_CHANGE[:3]
        return _view(history.without(history.current_id, next_id=_new_id()))

    # Turns: each yields what `_turn_view` shows.

    async def send(self, request: gr.Request, prompt: str, stored_history: object, *settings: Any) -> Stream:
        history = _history(stored_history)
        if not prompt.strip():
            yield NO_CHANGE
            return
        async for updates in self._run(history, len(history.current.turns), prompt, settings, request):
            yield updates

    async def send_example(
        self, request: gr.Request, example: gr.SelectData, stored_history: object, *settings: Any
    ) -> Stream:
        async for updates in self.send(request, str(example.value["text"]), stored_history, *settings):
            yield updates

    async def retry(self, request: gr.Request, stored_history: object, *settings: Any) -> Stream:
        """The last prompt again, in place of its answer."""
        history = _history(stored_history)
        turns = history.current.turns
        if not turns:
            yield NO_CHANGE
            return
        async for updates in self._run(history, len(turns) - 1, turns[-1].prompt, settings, request):
            yield updates

    async def edit(self, request: gr.Request, edited: gr.EditData, stored_history: object, *settings: Any) -> Stream:
        """Another prompt in place of an earlier one; what followed it goes."""
        history = _history(stored_history)
        index = turn_index_of(_first_index(edited.index))
        prompt = plain_prompt(str(edited.value))
        if prompt.strip() and index < len(history.current.turns):
            async for updates in self._run(history, index, prompt, settings, request):
                yield updates
        else:
            yield _turn_view(history, is_running=False)

    async def _run(
        self, history: History, turn_index: int, prompt: str, values: Sequence[Any], request: gr.Request
    ) -> Stream:
        """Answers `prompt` as turn `turn_index` of the current chat; later turns are dropped."""
        session = str(request.session_hash)
        try:
            settings = Settings.from_values(values)
            sampling = settings.sampling()
        except (TypeError, ValueError) as error:
            gr.Warning(str(error))
            yield NO_CHANGE
            return
        if self._running.is_running(session):
            gr.Info("One answer at a time: stop the current one first.")
            yield NO_CHANGE
            return
        chat = history.current
        earlier = chat.turns[:turn_index]
        messages = messages_to_send(settings.system_prompt, earlier, prompt)
        switch = self._running.begin(session)
        try:
            turn = Turn(prompt)
            yield _turn_view(history.with_conversation(replace(chat, turns=(*earlier, turn))), is_running=True)
            events = self._api.stream_chat(self._model, messages, sampling, authorization=_authorization(request))
            async with aclosing(run_turn(turn, events, switch, now=time.monotonic)) as grown:
                async for turn in grown:
                    changed = history.with_conversation(replace(chat, turns=(*earlier, turn)))
                    if turn.status is TurnStatus.RUNNING:
                        yield _growth_view(changed)
                    else:
                        yield _turn_view(changed, is_running=False)
        finally:
            self._running.end(session, switch)

    async def stop(self, request: gr.Request) -> None:
        """Returns when the turn has ended and its last update is on its way to the browser."""
        await self._running.stop(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._running.press_stop(str(request.session_hash))

    # Connection.

    async def check_connection(self, request: gr.Request) -> Updates:
        """Whether to show the chat or the preparation, and whether to look again in a second."""
        authorization = _authorization(request)
        readiness: Readiness | None
        try:
            readiness = await self._api.readiness(authorization=authorization)
            if readiness.ready:
                self._model = await self._api.model_name(authorization=authorization)
        except ApiProblem as problem:
            readiness = Readiness(ready=False) if problem.kind is ProblemKind.UNAVAILABLE else None
        return _connection_view(readiness, self._model)


def _view(history: History) -> Updates:
    return [chatbot_messages(history.current.turns), _chat_list(history), history_to_json(history)]


def _turn_view(history: History, *, is_running: bool) -> Updates:
    """At the start and the end of a turn: everything, and the browser keeps it."""
    if is_running:
        return [*_view(history), gr.Textbox(value="", submit_btn=False, stop_btn=True), gr.skip()]
    # After a failure the server may be starting up again: look, until it is ready.
    turns = history.current.turns
    has_failed = bool(turns) and turns[-1].status is TurnStatus.FAILED
    return [
        *_view(history),
        gr.Textbox(submit_btn=True, stop_btn=False),
        gr.Timer(active=True) if has_failed else gr.skip(),
    ]


def _growth_view(history: History) -> Updates:
    """In between: only the messages, up to 25 times a second."""
    return [chatbot_messages(history.current.turns), *NO_CHANGE[1:]]


def _chat_list(history: History) -> gr.Radio:
    choices = [(chat.title, chat.id) for chat in history.conversations]
    is_listed = any(chat.id == history.current_id for chat in history.conversations)
    return gr.Radio(choices=choices, value=history.current_id if is_listed else None)


def _connection_view(readiness: Readiness | None, model: str) -> Updates:
    """`readiness` None: the server cannot be reached."""
    is_ready = readiness is not None and readiness.ready
    # While the engine starts again the chat stays in view; a turn says what happened to it.
    is_preparing = readiness is not None and not readiness.ready and (readiness.is_preparing or not model)
    return [
        status_pill(model, readiness),
        progress_panel(readiness) if readiness and is_preparing else "",
        gr.Timer(active=not is_ready),
    ]


def show_custom(is_custom: bool) -> Updates:
    return [gr.Slider(visible=is_custom), gr.Slider(visible=is_custom)]


def keep_settings(*values: Any) -> list[Any]:
    return list(values)


def _history(stored: object) -> History:
    return history_from_json(stored, new_id=_new_id())


def _new_id() -> str:
    return uuid.uuid4().hex


def _authorization(request: gr.Request) -> str | None:
    value = request.headers.get("authorization")
    return value if isinstance(value, str) else None


def _first_index(index: int | list[int] | tuple[int, ...]) -> int:
    return index if isinstance(index, int) else index[0]


def build_page(api: ApiClient) -> gr.Blocks:
    with gr.Blocks(title="Causerie", fill_height=True, fill_width=True, analytics_enabled=False) as page:
        _wire(page, build_layout(), ChatPage(api))
    return page


def _wire(page: gr.Blocks, parts: PageParts, chat: ChatPage) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    view = [parts.chatbot, parts.chat_list, parts.history_store]
    turn_view = [*view, parts.prompt_box, parts.readiness_timer]
    connection = [parts.pill, parts.preparing, parts.readiness_timer]
    settings = parts.settings
    stored = [parts.history_store, *settings.all]

    page.load(None, None, parts.sidebar, js=OPEN_SIDEBAR_IF_WIDE, **quiet)
    # Chat and sidebar stay hidden until the connection is known, and that is asked after the stored chats and settings
    # are back: what a user sends or sets first can then not be overwritten by what is loaded late.
    page.load(
        chat.load,
        [parts.history_store, parts.settings_store],
        [*view, *settings.all, settings.temperature, settings.top_p],
        **quiet,
    ).then(chat.check_connection, None, connection, **quiet)
    parts.readiness_timer.tick(chat.check_connection, None, connection, **quiet)
    page.unload(chat.leave)

    # "multiple": Gradio would drop what is sent in the moment between an answer's last word and its event's end.
    turn: dict[str, Any] = {**quiet, "trigger_mode": "multiple"}
    parts.prompt_box.submit(chat.send, [parts.prompt_box, *stored], turn_view, **turn)
    parts.chatbot.example_select(chat.send_example, stored, turn_view, **turn)
    parts.chatbot.retry(chat.retry, stored, turn_view, **turn)
    parts.chatbot.edit(chat.edit, stored, turn_view, **turn)
    parts.prompt_box.stop(chat.stop, None, None, **quiet)

    # A running turn ends first, with its last update stored; only then is the history read again.
    parts.new_chat.click(chat.stop, None, None, **quiet).then(chat.new_chat, parts.history_store, view, **quiet)
    confirmed = parts.is_delete_confirmed
    parts.delete_chat.click(chat.confirm_delete, confirmed, confirmed, js=ASK_BEFORE_DELETING, **quiet).then(
        chat.delete_chat, [confirmed, parts.history_store], view, **quiet
    )
    parts.chat_list.input(chat.stop, None, None, **quiet).then(
        chat.open_chat, [parts.chat_list, parts.history_store], view, **quiet
    )

    settings.is_custom.input(show_custom, settings.is_custom, [settings.temperature, settings.top_p], **quiet)
    for component in settings.all:
        component.change(keep_settings, settings.all, parts.settings_store, **quiet)
