"""How well documents answer a query, and which class texts are of: Jina's, Cohere's and vLLM's routes."""
