"""`serve proxy`: one address for several servers, this project's or others that speak OpenAI's protocol."""
