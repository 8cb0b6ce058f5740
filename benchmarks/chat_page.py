"""Pictures of the chat page for eyes to judge: python -m benchmarks.chat_page FOLDER

A script speaks for the model, a headless Chromium shows the page at a desktop's width and a phone's, in light
and dark; FOLDER gets one PNG a scene and size. Needs Chromium, playwright and what the tests need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lmdeploy_jax.engine.request import Request
from tests.scripted import TOKENIZER, ids
from tests.server.browser import TOOLS, Actor, finished, launched, opened, send, setting
from tests.server.live import serving
from tests.server.scripted import scripted

SIZES = {
    "desktop": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "desktop-dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True},
    "phone-dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True},
}
TOUR = r"""## Gradient descent

For a loss $L(\theta)$ one step is

$$
\theta_{t+1} = \theta_t - \eta \, \nabla_\theta L(\theta_t), \qquad
L(\theta) = \frac{1}{n} \sum_{i=1}^{n} \left\| f_\theta(x_i) - y_i \right\|^2
$$

and it ends where \(\lim_{t \to \infty} \nabla L = 0\), or in matrices

\[
\begin{aligned}
A x &= b, \quad A = \begin{pmatrix} a_{11} & a_{12} \\ a_{21} & a_{22} \end{pmatrix} \\
x &= A^{-1} b \quad\Rightarrow\quad \boxed{x = 42}
\end{aligned}
\]

1. **Choose** a *rate*, as in `lr = 0.1`
2. Repeat, as [the book](https://example.org) says
   - until it ends

| step | loss | note |
|-----:|:----:|------|
| 1 | 0.52 | large |
| 2 | 0.13 | $\frac{1}{4}$ of it |

> Patience is a virtue.

```python
def descend(x: float, rate: float = 0.1) -> float:
    # one step
    return x - rate * gradient(x)
```
"""


class Guide(Actor):
    """Shows what answers may hold where it is asked for a tour."""

    def __call__(self, request: Request, index: int) -> Iterable[int]:
        prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
        asked = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        return ids(TOUR) if asked.endswith("tour") else super().__call__(request, index)


def tour(page: Any, actor: Actor) -> None:
    send(page, "Give me a tour")
    finished(page)


def begin(page: Any, actor: Actor) -> None:
    tour(page, actor)
    page.locator("#messages").evaluate("list => list.scrollTo(0, 0)")


def thinking(page: Any, actor: Actor) -> None:
    """Half of an answer whose thought is still under way."""
    actor.go.clear()
    send(page, "halt think")
    page.locator(".assistant summary").wait_for()


def thought(page: Any, actor: Actor) -> None:
    send(page, "Please think")
    finished(page).locator("summary").click()


def tool(page: Any, actor: Actor) -> None:
    setting(page, "tools", TOOLS)
    page.click("#show-settings")
    send(page, "Please call")
    finished(page)


def refused(page: Any, actor: Actor) -> None:
    tour(page, actor)
    send(page, "long " * 3000)
    page.locator(".user .error").wait_for()


def cut(page: Any, actor: Actor) -> None:
    setting(page, "max_tokens", "5")
    page.click("#show-settings")
    send(page, "An answer that goes on beyond its limit")
    finished(page)


def settings(page: Any, actor: Actor) -> None:
    tour(page, actor)
    setting(page, "temperature", "9")


def conversations(page: Any, actor: Actor) -> None:
    for name in ("First", "Second"):
        send(page, f"{name} question")
        finished(page)
        page.click("#new")
    if page.locator("#conversations").is_hidden():
        page.click("#show-conversations")


Scene = Callable[[Any, Actor], None]
SCENES: tuple[Scene, ...] = (begin, tour, thinking, thought, tool, refused, cut, settings, conversations)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    actor = Guide()
    with scripted(actor, session_len=2048) as (frontend, _), serving(frontend) as live, launched() as browser:
        for size, options in SIZES.items():
            with opened(browser, live.url, **options) as page:
                page.screenshot(path=folder / f"{size}-empty.png")
            for scene in SCENES:
                with opened(browser, live.url, **options) as page:
                    scene(page, actor)
                    page.screenshot(path=folder / f"{size}-{scene.__name__}.png")
                    actor.go.set()
    print(f"{len(SIZES) * (len(SCENES) + 1)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
