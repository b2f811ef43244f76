"""The components of the chat page and where they stand; what they do is wired in `ui.page`.

Everything that is looked at lives here, in `ui.render` and in `assets/page.css`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

__all__ = ["PageParts", "SettingsParts", "build_layout", "favicon_path", "page_css", "page_script", "page_theme"]

ASSETS = Path(__file__).parent / "assets"

# Browser storage needs a name that stays. Gradio wants a secret to scramble it with; it hides nothing from the browser
# it is kept in, and a random one would make every history unreadable after a restart.
STORAGE_NAME = "causerie.chats"
SETTINGS_NAME = "causerie.settings"
STORAGE_SCRAMBLE = "causerie-history"

EXAMPLES = (
    "Explain photosynthesis to a ten-year-old",
    "Write a Python function that reverses a string",
    "Give me three ideas for a rainy Sunday",
    "用中文介绍一下你自己",
)

WELCOME = '<div class="causerie-welcome"><h1>What shall we talk about?</h1></div>'
HONEST_NOTICE = '<p class="causerie-honest">A small model, often wrong. Nothing leaves this machine.</p>'
BRAND = '<div class="causerie-brand"><span class="mark">C</span><span>Causerie</span></div>'


@dataclass(frozen=True, slots=True)
class SettingsParts:
    system_prompt: gr.Textbox
    max_tokens: gr.Slider
    is_custom: gr.Checkbox
    temperature: gr.Slider
    top_p: gr.Slider
    seed: gr.Textbox

    @property
    def all(self) -> list[Any]:
        """In the order of `ui.settings.Settings`."""
        return [self.system_prompt, self.max_tokens, self.is_custom, self.temperature, self.top_p, self.seed]


@dataclass(frozen=True, slots=True)
class PageParts:
    history_store: gr.BrowserState
    settings_store: gr.BrowserState
    readiness_timer: gr.Timer
    sidebar: gr.Sidebar
    new_chat: gr.Button
    chat_list: gr.Radio
    delete_chat: gr.Button
    is_delete_confirmed: gr.Checkbox
    settings: SettingsParts
    pill: gr.HTML
    preparing: gr.HTML
    chatbot: gr.Chatbot
    prompt_box: gr.Textbox


def build_layout() -> PageParts:
    """Must be called inside `with gr.Blocks()`."""
    history_store = gr.BrowserState(None, storage_key=STORAGE_NAME, secret=STORAGE_SCRAMBLE)
    settings_store = gr.BrowserState(None, storage_key=SETTINGS_NAME, secret=STORAGE_SCRAMBLE)
    readiness_timer = gr.Timer(1.0, active=False)
    with gr.Sidebar(width=288, open=False, elem_id="sidebar") as sidebar:
        gr.HTML(BRAND)
        new_chat = gr.Button("New chat", elem_id="new-chat", variant="secondary")
        chat_list = gr.Radio(
            choices=[], show_label=False, container=False, label="Chats", elem_id="chat-list", interactive=True
        )
        delete_chat = gr.Button("Delete this chat", elem_id="delete-chat", size="sm", variant="secondary")
        # Not seen: the answer to "really delete?", between the question in the browser and the deed.
        is_delete_confirmed = gr.Checkbox(visible=False)
        settings = _build_settings()
    pill = gr.HTML("", elem_id="pill")
    preparing = gr.HTML("", elem_id="preparing")
    with gr.Column(elem_id="chat"):
        chatbot = _build_chatbot()
        prompt_box = gr.Textbox(
            placeholder="Write a message",
            show_label=False,
            label="Message",
            lines=1,
            max_lines=10,
            max_length=100_000,
            autofocus=True,
            submit_btn=True,
            stop_btn=False,
            container=False,
            elem_id="composer",
        )
        gr.HTML(HONEST_NOTICE)
    return PageParts(
        history_store=history_store,
        settings_store=settings_store,
        readiness_timer=readiness_timer,
        sidebar=sidebar,
        new_chat=new_chat,
        chat_list=chat_list,
        delete_chat=delete_chat,
        is_delete_confirmed=is_delete_confirmed,
        settings=settings,
        pill=pill,
        preparing=preparing,
        chatbot=chatbot,
        prompt_box=prompt_box,
    )


def _build_chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        container=False,
        elem_id="chatbot",
        layout="bubble",
        height="100%",
        editable="user",
        buttons=["copy"],
        placeholder=WELCOME,
        examples=[{"text": example} for example in EXAMPLES],
        sanitize_html=True,
        render_markdown=True,
        allow_tags=False,
        allow_file_downloads=False,
        feedback_options=None,
        latex_delimiters=[
            {"left": "$$", "right": "$$", "display": True},
            {"left": "\\(", "right": "\\)", "display": False},
            {"left": "\\[", "right": "\\]", "display": True},
        ],
    )


def _build_settings() -> SettingsParts:
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system_prompt = gr.Textbox(
            label="System prompt",
            placeholder="How the model should behave, for example: Answer in one short paragraph.",
            lines=3,
            max_lines=8,
            max_length=20_000,
            elem_id="system-prompt",
        )
        max_tokens = gr.Slider(16, 4096, value=1024, step=16, label="Longest answer (tokens)", elem_id="max-tokens")
        is_custom = gr.Checkbox(
            value=False, label="Set temperature and top-p myself", container=False, elem_id="is-custom"
        )
        temperature = gr.Slider(0, 2, value=0.7, step=0.05, label="Temperature", visible=False, elem_id="temperature")
        top_p = gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p", visible=False, elem_id="top-p")
        seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, max_length=19, elem_id="seed")
    return SettingsParts(system_prompt, max_tokens, is_custom, temperature, top_p, seed)


def page_css() -> str:
    return _asset("page.css")


def page_script() -> str:
    return _asset("page.js")


def favicon_path() -> Path:
    return ASSETS / "favicon.svg"


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def page_theme() -> themes.Base:
    """System fonts only: the fonts of Gradio's own themes come from the network or are not there."""
    return themes.Base(
        primary_hue=themes.colors.teal,
        secondary_hue=themes.colors.teal,
        neutral_hue=themes.colors.zinc,
        radius_size=themes.sizes.radius_lg,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    )
