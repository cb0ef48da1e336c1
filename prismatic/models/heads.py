"""How a chunk of actions comes out of one forward pass (OpenVLA-OFT): the regression head, the robot state's token, the blanks in the sequence.

In: hidden states (B, K·D, H), one before each blank. Out: actions (B, K, D), normalised. Names and shapes are the original's.
Surprising: the blanks are zero vectors, when learning and when acting, so nothing of the true actions reaches the model; behind them stands the
end token, which every position attends to, as all of them attend to each other.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from action_tokenizer import ActionTokenizer

HEADS = ("action_head", "proprio_projector")  # submodules of a VLA that a checkpoint keeps in files of their own
RESIDUAL_BLOCKS = 2


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Layer norm, a linear layer with ReLU, residual blocks, layer norm, a linear layer."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(RESIDUAL_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1RegressionHead(nn.Module):
    """The D hidden states of a step, side by side, become that step's D numbers. Neither squashed nor clipped."""

    def __init__(self, hidden_size: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMLP(action_dim * hidden_size, hidden_size, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, K·D, H), step by step → (B, K, D) float32."""
        steps = hidden.reshape(len(hidden), -1, self.action_dim * hidden.shape[-1])  # (B, K, D·H)
        return self.model(steps.to(self.model.fc1.weight.dtype)).float()


class ProprioProjector(nn.Module):
    """The robot's state becomes one token of the sequence."""

    def __init__(self, proprio_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Tensor) -> Tensor:
        """(B, proprio_dim), normalised → (B, 1, H)."""
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))[:, None]


def with_blanks(
    input_ids: Tensor, lengths: Tensor, *, blanks: int, end: int | None, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append `blanks` places for actions and the end token to prompts (B, T) of `lengths` (B,) tokens, right-padded.

    → ids (B, T + blanks + 1), attention_mask and is_blank of the same shape, bool. end None: no end token, as some RL recipes train.
    """
    ids = F.pad(input_ids, (0, blanks + (end is not None)), value=pad)
    behind = torch.arange(ids.shape[1], device=ids.device) - lengths[:, None]  # (B, columns): 0 at the first blank
    is_blank = (behind >= 0) & (behind < blanks)
    if end is not None:
        ids = ids.masked_fill(behind == blanks, end)
    return ids, behind < blanks + (end is not None), is_blank


def before_blanks(hidden: Tensor, is_blank: Tensor, blanks: int) -> Tensor:
    """Hidden states (B, S, H) one position before each of a row's blanks, which stand side by side: (B, blanks, H).

    is_blank (B, T): of the last T of the S positions.
    """
    first = is_blank.int().argmax(dim=1, keepdim=True) + hidden.shape[1] - is_blank.shape[1]  # (B, 1)
    positions = first + torch.arange(-1, blanks - 1, device=hidden.device)
    return torch.take_along_dim(hidden, positions[..., None], dim=1)


def bin_centers(ids: Tensor, tokenizer: ActionTokenizer) -> Tensor:
    """Action ids → float32 centres of their bins, as ActionTokenizer.decode has them in float64."""
    centers = torch.from_numpy(tokenizer.centers).float().to(ids.device)
    return centers[(tokenizer.vocab_size - 1 - ids).clamp(0, len(centers) - 1)]
