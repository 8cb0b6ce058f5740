"""OpenAI's embeddings, and /pooling."""
