"""A velocity model of one's own: how it is built, how it is called, and which of its modules are layers.

    python probe.py --backbone=examples/my_model.py:MyModel --random_init --check
    python train.py config/demo.py --backbone=examples/my_model.py:MyModel --out_dir=out/my_model

x_t (B, T, M) and cond (B, T, D) are zero on padding, t is (B,). mask (B, T), True elsewhere, is for those that name it.
"""

import torch
from torch import nn


class Block(nn.Module):
    """A residual block, (B, T, D) -> (B, T, D): closed, it returns its first input."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv1d(dim, dim, 31, padding=15, groups=dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h, time, mask):
        x = self.norm(h + time[:, None]) * mask[..., None]
        return h + self.mlp(self.conv(x.mT).mT)


class MyModel(nn.Module):
    def __init__(self, n_mels, dim, depth):
        super().__init__()
        self.stem, self.time, self.head = nn.Linear(n_mels + dim, dim), nn.Linear(1, dim), nn.Linear(dim, n_mels)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def layers(self):
        return self.blocks  # where a layer is branches that are added outside: [[b.attn, b.mlp] for b in self.blocks]

    def forward(self, x_t, t, cond, mask):
        h = self.stem(torch.cat([x_t, cond], dim=-1))
        for block in self.blocks:
            h = block(h, self.time(t[:, None]), mask)
        return self.head(h)  # the velocity, (B, T, M)
