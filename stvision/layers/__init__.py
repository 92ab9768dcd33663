"""Parts of networks that are no attention: rotary embeddings, norms over frames, convolutions."""
