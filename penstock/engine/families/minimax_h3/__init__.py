"""MiniMax-H3: video with sound from a prompt, and from pictures where there are any."""
