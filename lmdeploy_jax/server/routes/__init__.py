"""Routes that belong to no protocol: what the server is, how it fares, and its administration."""
