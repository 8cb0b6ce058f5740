"""Tools that clients run and name by a type alone, since Anthropic's models know what they take."""

from __future__ import annotations

from typing import Any, NamedTuple


class KnownTool(NamedTuple):
    """What a model must be told of it."""

    description: str
    input_schema: dict[str, Any]


def _schema(required: list[str], commands: list[str] | None = None, **properties: str) -> dict[str, Any]:
    """An object of properties by their types; `command` is one of `commands`, where there are some."""
    found: dict[str, Any] = {name: {"type": kind} for name, kind in properties.items()}
    if commands:
        found = {"command": {"type": "string", "enum": commands}} | found
    if "view_range" in found:
        found["view_range"]["items"] = {"type": "integer"}
    return {"type": "object", "properties": found, "required": required}


_EDITS = ["view", "create", "str_replace", "insert"]
_EDIT_FIELDS = {"file_text": "string", "old_str": "string", "new_str": "string", "insert_line": "integer"}
_BASH = KnownTool(
    "Run a command in a shell that stays open between calls, or restart it.",
    _schema([], command="string", restart="boolean"),
)
_EDITOR = (
    "View and edit files. view: path, perhaps view_range [first, last]. create: path, file_text. "
    "str_replace: path, old_str, which must occur exactly once, new_str. insert: path, insert_line, new_str."
)
_MEMORY = KnownTool(
    "Keep notes as files under /memories. view: path, perhaps view_range. create: path, file_text. "
    "str_replace: path, old_str, new_str. insert: path, insert_line, insert_text. delete: path. "
    "rename: old_path, new_path.",
    _schema(
        ["command"],
        [*_EDITS, "delete", "rename"],
        **{"path": "string", **_EDIT_FIELDS, "insert_text": "string"},
        **{"view_range": "array", "old_path": "string", "new_path": "string"},
    ),
)


def known_tool(kind: str) -> KnownTool | None:
    """The tool of a type such as `bash_20250124`."""
    if kind.startswith("bash_"):
        return _BASH
    if kind.startswith("memory_"):
        return _MEMORY
    if not kind.startswith("text_editor_"):
        return None
    edits = [*_EDITS, "undo_edit"] if kind < "text_editor_20250429" else _EDITS
    fields = {"path": "string", **_EDIT_FIELDS, "view_range": "array"}
    return KnownTool(_EDITOR, _schema(["command", "path"], edits, **fields))
