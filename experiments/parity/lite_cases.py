"""The EfficientNet-Lite that is compared with timm's. No torch here."""

from __future__ import annotations

SIZES = (0.25, 0.4)
"""Width and depth."""

IMAGE = (1, 45, 64, 3)

FIXTURE = "efficientnet_lite.npz"
