"""One engine over several nodes: how they find each other, agree, and learn that one is lost."""
