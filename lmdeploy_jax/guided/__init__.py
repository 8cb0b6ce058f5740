"""Guided decoding: answers held to a JSON schema, a regular expression, a list of choices or a grammar.

llguidance compiles grammars and computes which tokens may come next. `Grammars` belongs to a tokenizer;
`response_format` describes what an answer must be; `tool_grammar` and `after_reasoning` write the response
formats that enforce tool calls and let a model think first.
"""

from lmdeploy_jax.guided.grammars import Grammar, Grammars
from lmdeploy_jax.guided.reasoning import after_reasoning
from lmdeploy_jax.guided.tools import has_grammar, tool_grammar

__all__ = ["Grammar", "Grammars", "after_reasoning", "has_grammar", "tool_grammar"]
