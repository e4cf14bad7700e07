"""Chatting with a loaded model: options, conversations, how replies are shown, commands, and the line editor.

Programs decide which model and options: `chat_cli`, and `quickstart` at its end.
"""

from niels_gpt.chat.conversation import Conversation, Span
from niels_gpt.chat.options import DEFAULT_SEED, ChatOptions, build_options, system_prompt
from niels_gpt.chat.session import answer_once, run_chat
from niels_gpt.chat.view import View, note

__all__ = [
    "DEFAULT_SEED",
    "ChatOptions",
    "Conversation",
    "Span",
    "View",
    "answer_once",
    "build_options",
    "note",
    "run_chat",
    "system_prompt",
]
