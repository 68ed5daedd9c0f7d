"""A small GPT, compiled by Lightning Thunder, whose attention runs on tilewise where that pays.

``GPT`` knows nothing of tilewise: it calls PyTorch's ``scaled_dot_product_attention``. Thunder
traces it, and the executor ``tilewise_long`` takes the calls with at least 32 keys, forward and
backward. Shorter ones stay with thunder's own executors.

    python examples/thunder_gpt.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def stand_in(name: str) -> Any:
    def missing(*args: object, **options: object) -> None:
        raise NotImplementedError(f"torch.Tensor.{name} is gone")

    missing.__name__ = name
    return missing


# thunder 0.2.6 lists these methods of named tensors when it is imported. PyTorch 2.13 no longer has
# them, and nothing in this example calls them.
for name in ("align_as", "align_to", "has_names", "refine_names", "rename", "rename_"):
    if not hasattr(torch.Tensor, name):
        setattr(torch.Tensor, name, stand_in(name))

import thunder  # noqa: E402

from tilewise.compat.thunder import make_executor  # noqa: E402

TOKENS, WIDTH, HEADS, LAYERS = 16, 64, 4, 2


class Block(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Next-token logits of ``[batch, length]`` tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def counting(batch: int, length: int) -> Tensor:
    """Sequences to learn: steps of 3, modulo 16, from anywhere."""
    return (torch.randint(TOKENS, (batch, 1)) + 3 * torch.arange(length)) % TOKENS


def replaced(traces: Any) -> list[str]:
    """The lines of the last trace that run on tilewise."""
    return [line.strip() for line in str(traces[-1]).splitlines() if "tilewise_long_" in line]


def main() -> None:
    torch.manual_seed(0)
    model = GPT()
    executor = make_executor("tilewise_long", when=lambda call: call.kv_len >= 32)
    compiled = thunder.jit(model, executors=[executor, *thunder.get_default_executors()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        tokens = counting(8, 49)
        loss = F.cross_entropy(compiled(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 39:
            print(f"step {step:2d}  loss {loss.item():.3f}")

    print("\nforward and backward at 48 tokens:")
    for line in replaced(thunder.last_traces(compiled)):
        print(" ", line)
    for line in replaced(thunder.last_backward_traces(compiled)):
        print(" ", line)

    tokens = counting(8, 17)
    right = (compiled(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).float().mean()
    print(f"\n{len(replaced(thunder.last_traces(compiled)))} calls replaced at 16 tokens")
    print(f"{right:.0%} of the next tokens are right")


if __name__ == "__main__":
    main()
