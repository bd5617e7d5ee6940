"""The videos that MiniMax-H3 makes, and the latents of their frames and of their sound.

Source: the constants of diffusers' ``MiniMaxH3ModularPipeline``. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.model.grid import Grid
from penstock.profiles.manifest import VideoShape

FPS = 24
CLIP_FRAMES, CLIP_LATENTS = 17, 5
"""Frames that become so many latent frames together; the last clip is cut short."""
LAST_FRAMES, LAST_LATENTS = 5, 2
FEWEST_CLIPS, MOST_CLIPS = 7, 20
"""Of 17 frames, before the last: 124 to 345 frames, 5 to 15 seconds."""
SIDE = 32
SPATIAL_FACTOR = 16
SOUND_RATE = 40
"""Latents of the sound a second, of each channel."""


MOST_FRAMES = CLIP_FRAMES * MOST_CLIPS + LAST_FRAMES

GRID = Grid(
    side=SIDE,
    temporal=CLIP_FRAMES,
    rest=LAST_FRAMES,
    fewest=CLIP_FRAMES * FEWEST_CLIPS + LAST_FRAMES,
    most=MOST_FRAMES,
    coherent=MOST_FRAMES,
    ends_alone=True,
)
"""Frames by whole clips of the VAE and a short one, within the lengths that were trained."""


@dataclass(frozen=True)
class Latents:
    """Sizes of what is denoised.

    Attributes:
        frames, height, width: of the video's latents.
        channels: likewise.
        sound: latents of each of the sound's channels.
        sound_channels: of each of those latents.
    """

    frames: int
    height: int
    width: int
    sound: int
    channels: int = 24
    sound_channels: int = 32

    @classmethod
    def of(cls, shape: VideoShape, channels: int = 24, sound_channels: int = 32) -> Latents:
        """Make it of a legal video."""
        clips = (shape.frames - LAST_FRAMES) // CLIP_FRAMES
        return cls(
            CLIP_LATENTS * clips + LAST_LATENTS,
            shape.height // SPATIAL_FACTOR,
            shape.width // SPATIAL_FACTOR,
            round(shape.frames / FPS * SOUND_RATE),
            channels,
            sound_channels,
        )

    @property
    def video_elements(self) -> int:
        """Of the video's latents."""
        return self.channels * self.frames * self.height * self.width

    @property
    def sound_elements(self) -> int:
        """Of the sound's, both channels."""
        return 2 * self.sound * self.sound_channels

    @property
    def elements(self) -> int:
        """Of both."""
        return self.video_elements + self.sound_elements

    @property
    def frame_rows(self) -> int:
        """Rows of the packed sequence that one latent frame takes."""
        return (self.height // 2) * (self.width // 2)

    @property
    def video_rows(self) -> int:
        """Rows of all frames."""
        return self.frames * self.frame_rows

    @property
    def sound_rows(self) -> int:
        """Rows of both channels."""
        return 2 * self.sound
