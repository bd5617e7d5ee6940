"""The whole job against diffusers' own pipelines, on tiny random models, with the same noise."""

from __future__ import annotations

import numpy as np
import pytest
