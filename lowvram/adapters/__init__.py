"""Small trained parts of frozen networks: low-rank adapters, packed base weights, embeddings of new words."""
