"""The chat template in the languages of others: Jinja for transformers and llama.cpp, Go for Ollama.

`chat_format` is the original, and every export is compared with it. Two things need care there, since those programs
write the conversation as one text and look for the names of control tokens in it afterwards:

- A sentinel typed by a user must stay text. In Hugging Face folders the template puts `MARK` before what all sentinels
  have in common, and the tokenizer's normaliser, which runs after control tokens are found, takes one away again: the
  ids are exactly ours. llama.cpp has no normaliser: there a blank breaks the sentinel, which changes that text.
- In the text form of byte models, a line that poses as another message is indented, as `chat_format` does.
"""

from __future__ import annotations

from niels_gpt.data.types import ROLES
from niels_gpt.export.spm import SENTINEL_ID
from niels_gpt.special_tokens import ASST_TOKEN, EOT_TOKEN, SYS_TOKEN, USR_TOKEN

MARK = "\ufdd0"  # a noncharacter: Unicode keeps it for internal use
BROKEN = f"{SENTINEL_ID[0]} {SENTINEL_ID[1:]}"

_ROLE_TOKENS = {"system": SYS_TOKEN, "user": USR_TOKEN, "assistant": ASST_TOKEN}
_UNKNOWN_ROLE = "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}"


def token_template(replacement: str) -> str:
    """Jinja for models with sentinels. `replacement`: what stands for the sentinels' common part inside messages."""
    branches = "".join(
        f"{{%- {'el' if n else ''}if message['role'] == '{role}' -%}}{{{{ '{token}' }}}}"
        for n, (role, token) in enumerate(_ROLE_TOKENS.items())
    )
    return (
        "{%- for message in messages -%}"
        f"{branches}{{%- else -%}}{_UNKNOWN_ROLE}{{%- endif -%}}"
        f"{{{{ (message['content'] | replace('{SENTINEL_ID}', '{replacement}')) + '{EOT_TOKEN}' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{ASST_TOKEN}' }}}}{{%- endif -%}}"
    )


def text_template() -> str:
    """Jinja for byte models: `role: content` lines. A last assistant message without content is the reply to come."""
    known = ", ".join(f"'{role}'" for role in ROLES)
    untagged = "".join(f" | replace('\\n{role}: ', '\\n {role}: ')" for role in ROLES)
    return (
        "{%- for message in messages -%}"
        f"{{%- if message['role'] not in [{known}] -%}}{_UNKNOWN_ROLE}{{%- endif -%}}"
        "{%- if not (loop.last and message['role'] == 'assistant' and message['content'] == '') -%}"
        f"{{{{ message['role'] + ': ' + (message['content']{untagged}) + '\\n' }}}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    )


def ollama_token_template() -> str:
    """Go template of Ollama for models with sentinels."""
    branches = "".join(
        f'{{{{- {"else " if n else ""}if eq .Role "{role}" }}}}{token}'
        for n, (role, token) in enumerate(_ROLE_TOKENS.items())
    )
    return f"{{{{- range .Messages }}}}{branches}{{{{- end }}}}{{{{ .Content }}}}{EOT_TOKEN}{{{{- end }}}}{ASST_TOKEN}"


def ollama_text_template() -> str:
    """Go template of Ollama for byte models."""
    return '{{- range .Messages }}{{ .Role }}: {{ .Content }}{{ "\\n" }}{{- end }}{{ "assistant: " }}'
