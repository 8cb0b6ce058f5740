"""Scores as the protocols' JSON."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.server.ids import new_id, now
from lmdeploy_jax.server.scores.bodies import RerankRequest
from lmdeploy_jax.server.scoring import Judged


def ranked(body: RerankRequest, model: str, judged: Judged) -> dict[str, Any]:
    """The documents that answer the query best, the best first."""
    texts, scores = body.texts(), [judged.judge.score(logits) for logits in judged.logits]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
    results = [{"index": i, "relevance_score": scores[i]} | _document(body, texts[i]) for i in best]
    return {"id": new_id("rerank"), "model": model, "usage": judged.usage, "results": results}


def _document(body: RerankRequest, text: str) -> dict[str, Any]:
    return {"document": {"text": text}} if body.return_documents else {}


def scored(model: str, judged: Judged) -> dict[str, Any]:
    """A number a pair."""
    return _listed("score", model, judged, [{"score": judged.judge.score(each)} for each in judged.logits])


def classified(model: str, judged: Judged) -> dict[str, Any]:
    """The likeliest label of each text, and the probabilities of all."""
    labels, found = judged.judge.head.labels, []
    for logits in judged.logits:
        probs = judged.judge.probabilities(logits)
        found.append(
            {"label": labels[int(probs.argmax())], "probs": probs.tolist(), "num_classes": len(labels)}
        )
    return _listed("classify", model, judged, found)


def _listed(kind: str, model: str, judged: Judged, found: list[dict[str, Any]]) -> dict[str, Any]:
    data = [{"index": i, "object": kind} | each for i, each in enumerate(found)]
    head = {"id": new_id(kind), "object": "list", "created": now(), "model": model}
    return head | {"data": data, "usage": judged.usage}
