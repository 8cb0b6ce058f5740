"""What notebooks show: answers and conversations as Markdown, and the notebook of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy_jax import Response
from lmdeploy_jax.session import Session
from tests import patience
from tests.scripted import echo, endless, opener

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture
def open_pipe():
    with opener() as open_pipe:
        yield open_pipe


def test_an_answer_is_markdown():
    answer = Response("**Four.**", 3, 9, "stop")
    assert answer._repr_markdown_() == "**Four.**\n\n<sub>9 + 3 tokens, stop</sub>"
    failed = Response("", 0, 9, "error", error_message="<b> is too long")
    assert failed._repr_markdown_().endswith("<sub>9 + 0 tokens, error: &lt;b&gt; is too long</sub>")


def test_several_answers_are_numbered():
    answers = Response("a", 1, 9, "stop", choices=[Response("b", 1, 9, "length")])
    shown = answers._repr_markdown_()
    assert shown.startswith("**Answer 0**\n\na\n\n")
    assert "\n\n**Answer 1**\n\nb\n\n" in shown


def test_a_conversation_is_markdown(open_pipe):
    assert Session()._repr_markdown_() == "*An empty conversation.*"
    pipe, _ = open_pipe(echo)
    session = pipe.chat("hi\nyou")
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "there"}]
    session = pipe.chat(prompt, session)
    (_, first), (_, second) = session.history
    assert session._repr_markdown_() == (
        f"> **user:** hi\n> you\n\n{first}\n\n> **system:** Be kind.\n>\n> **user:** there\n\n{second}"
    )


def test_a_turn_that_did_not_end_well_is_shown_last(open_pipe):
    pipe, _ = open_pipe(endless)
    session = pipe.session()
    for _ in pipe.chat("go on", session, stream_response=True):
        session.abort()
    assert session.history == []
    assert session._repr_markdown_().startswith("> **user:** go on\n\n")
    assert session._repr_markdown_().endswith("tokens, abort</sub>")


def test_images_are_named():
    session = Session()
    session.history.append(
        ([{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}], "A.")
    )
    assert session._repr_markdown_() == "> **user:** What? *(image)*\n\nA."


def shown(cell):
    """What stays of a cell's outputs: as Markdown where there is that, else as text."""
    kept = [out for out in cell.outputs if out.get("name") != "stderr"]
    return [out.get("text") or out.data.get("text/markdown") or out.data["text/plain"] for out in kept]


def told(cell):
    return "".join(out.text for out in cell.outputs if out.get("name") == "stderr")


def test_the_notebook_of_the_documentation_says_what_it_shows(tmp_path, monkeypatch):
    """In a kernel as Jupyter starts it, with the bars of a start and of a batch."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # this test's programs are optimised, as users' are
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    expected = [shown(cell) for cell in cells]
    nbclient.NotebookClient(notebook, timeout=patience.PATIENCE).execute(cwd=str(tmp_path))
    assert [shown(cell) for cell in cells] == expected
    assert "\rloading" in told(cells[0])
    assert "\rAnswers" in "".join(told(cell) for cell in cells if "use_tqdm" in cell.source)
