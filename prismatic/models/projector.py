"""Two towers' patch features → the language model's width. In: (B, N, D_dino + D_siglip). Out: (B, N, hidden)."""

from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 4  # fc1 widens to four times the fused width: 2176 → 8704


class Projector(nn.Module):
    """`fused-gelu-mlp`: three linear layers with exact (erf) GELU between them."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, EXPANSION * vision_width)
        self.fc2 = nn.Linear(EXPANSION * vision_width, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, vision_width) → (B, N, hidden_size)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))
