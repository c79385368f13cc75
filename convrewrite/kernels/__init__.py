"""One local-attention core behind a torch custom op, and the backends that compute it."""
