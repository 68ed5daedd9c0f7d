"""A model written for flash-attn, unmodified, on a machine without CUDA.

``TinyDecoder`` stands for any model file that begins with ``from flash_attn import ...``. It is
trained for a few steps on packed sequences and then generates with a cache in place.

    python examples/flash_attn_on_cpu.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tilewise.compat.flash_attn

tilewise.compat.flash_attn.install()

# From here on nothing knows of tilewise.
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: E402
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb  # noqa: E402

TOKENS, WIDTH, HEADS, KV_HEADS, DIM = 16, 64, 4, 2, 16


class TinyDecoder(nn.Module):
    """One causal attention layer with rotary positions and grouped heads, between embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, TOKENS)
        self.rotary = RotaryEmbedding(DIM)
        self.rotary._update_cos_sin_cache(256, device=torch.device("cpu"), dtype=torch.float32)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``(..., heads, DIM)``."""
        x = self.embed(tokens)
        k, v = self.kv(x).unflatten(-1, (2, KV_HEADS, DIM)).unbind(-3)
        return self.q(x).unflatten(-1, (HEADS, DIM)), k, v

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Logits of packed tokens ``(total,)``."""
        q, k, v = self.project(tokens)
        cos, sin = self.rotary._cos_cached, self.rotary._sin_cached
        q, k = (apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens) for x in (q, k))
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        y = flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(32, 0))
        return self.out(y.flatten(-2))

    def step(self, tokens: Tensor, caches: tuple[Tensor, Tensor], filled: int) -> Tensor:
        """Logits of new tokens ``(batch, new)``, which are appended to the caches."""
        q, k, v = self.project(tokens)
        y = flash_attn_with_kvcache(
            q,
            *caches,
            k,
            v,
            rotary_cos=self.rotary._cos_cached,
            rotary_sin=self.rotary._sin_cached,
            rotary_interleaved=False,
            cache_seqlens=filled,
            causal=True,
            window_size=(32, 0),
        )
        return self.out(y.flatten(-2))


def counting(length: int) -> Tensor:
    """A sequence to learn: steps of 3, modulo 16, from anywhere."""
    return (int(torch.randint(TOKENS, ())) + 3 * torch.arange(length)) % TOKENS


def main() -> None:
    torch.manual_seed(0)
    model = TinyDecoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        sequences = [counting(int(n)) for n in torch.randint(5, 40, (8,))]
        lengths = torch.tensor([0] + [len(s) - 1 for s in sequences])
        cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
        inputs, targets = (torch.cat([s[part] for s in sequences])
                           for part in (slice(None, -1), slice(1, None)))  # fmt: skip
        logits = model(inputs, cu_seqlens, int(lengths.max()))
        loss = nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == 59:
            print(f"step {step:2d}  loss {loss.item():.3f}")

    tokens = torch.tensor([[5, 8, 11], [0, 3, 6]])
    caches = tuple(torch.zeros(2, 64, KV_HEADS, DIM) for _ in range(2))
    with torch.no_grad():
        filled, new = 0, tokens
        for _ in range(10):
            logits = model.step(new, caches, filled)
            filled, new = filled + new.shape[1], logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
    for row in tokens.tolist():
        print("generated", *row)
    right = (tokens[:, 1:] == (tokens[:, :-1] + 3) % TOKENS).float().mean()
    print(f"{right:.0%} of the steps are steps of 3")


if __name__ == "__main__":
    main()
