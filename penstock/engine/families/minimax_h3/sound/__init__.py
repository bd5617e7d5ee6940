"""The audio VAE of MiniMax-H3: latents to a waveform."""
