"""The video VAE of MiniMax-H3: a causal CNN that encodes, a vision transformer that decodes."""
