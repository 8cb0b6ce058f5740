"""GET /: a chat page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

router = APIRouter(include_in_schema=False)
PAGE = Path(__file__).parent.parent / "static" / "chat.html"
# The page loads nothing from elsewhere, and nothing that a model says can make it.
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def chat_page() -> FileResponse:
    """One file that works offline."""
    return FileResponse(PAGE, headers={"content-security-policy": POLICY, "cache-control": "no-cache"})
