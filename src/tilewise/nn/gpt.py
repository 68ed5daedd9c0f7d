"""A small GPT: token embedding, decoder blocks, final norm, tied output head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks
from .attention import FlashMultiHeadAttention
from .blocks import TransformerDecoderBlock
from .cache import KVCache
from .peers import ATTENTION_TYPES
from .rotary import RotaryConfig
from .sampling import sample

POSITIONS = ("rotary", "learned")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a :class:`GPT`.

    Args:
        vocab_size: number of tokens.
        context: length of the training sequences. With rotary positions a token sees at most this
            many tokens, itself included, so sequences of any length can be read and generated; with
            learned positions no sequence can be longer.
        layers, heads, dim: decoder blocks, query heads of each, width of the residual stream.
        kv_heads: key and value heads, a divisor of ``heads``; None for ``heads``.
        mlp_ratio: hidden width of the feed-forward networks, in units of ``dim``.
        dropout: see :class:`~tilewise.nn.TransformerEncoderBlock`; also applied to the embedding.
        bias: whether projections and norms add a bias.
        positions: "rotary" or "learned".
        rotary_base: wavelength base of rotary positions.
        attention: "tilewise"; or "standard" or "sdpa" to compare training with dense attention or
            with PyTorch's own. Generation with a cache runs on tilewise in any case.
        backend: which tilewise implementation runs.

    Raises:
        ValueError: a value is out of range, with its name.
    """

    vocab_size: int
    context: int = 256
    layers: int = 4
    heads: int = 4
    dim: int = 128
    kv_heads: int | None = None
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    bias: bool = False
    positions: str = "rotary"
    rotary_base: float = 10000.0
    attention: str = "tilewise"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name, choices in (("positions", POSITIONS), ("attention", tuple(ATTENTION_TYPES))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")
        if self.kv_heads is not None and (self.kv_heads <= 0 or self.heads % self.kv_heads):
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.attention != "tilewise" and self.backend != "auto":
            raise ValueError(
                f"backend {self.backend!r} is for attention 'tilewise', got {self.attention!r}"
            )


class GPT(nn.Module):
    """A decoder-only language model (pre-norm, GELU; initialised as GPT-2)."""

    def __init__(
        self,
        config: GPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rotary = config.positions == "rotary"
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim, **factory)
        self.position_embedding = (
            None if rotary else nn.Embedding(config.context, config.dim, **factory)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TransformerDecoderBlock(
                config.dim,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                bias=config.bias,
                dropout=config.dropout,
                attention_type=ATTENTION_TYPES[config.attention],
                num_kv_heads=config.kv_heads,
                rotary=RotaryConfig(base=config.rotary_base) if rotary else False,
                backend=config.backend,
                **factory,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, bias=config.bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero biases and normal weights of deviation 0.02, smaller in the residual branches.

        Each layer adds twice to the residual stream, so the weights that write to it are divided by
        sqrt(2 * layers) (Radford et al., "Language models are unsupervised multitask learners",
        2019, section 2.3).
        """
        residual = ("out_proj.weight", "mlp.2.weight")
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = 0.02 / (2 * self.config.layers) ** 0.5 if name.endswith(residual) else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens: Tensor, *, cache: list[KVCache] | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: ``[batch, length]`` integers below ``vocab_size``.
            cache: one :class:`KVCache` per block from :meth:`allocate_cache`; ``tokens`` then
                continue what it holds, under ``torch.no_grad()``.

        Returns:
            ``[batch, length, vocab_size]``.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [batch, length], got {list(tokens.shape)}")
        length = tokens.shape[1]
        end = length + (cache[0].longest if cache else 0)
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            if end > self.config.context:
                raise ValueError(
                    f"{end} tokens exceed context {self.config.context}, which learned positions "
                    "cannot extend; use positions='rotary'"
                )
            first = torch.arange(length, device=tokens.device)
            x = x + self.position_embedding(cache[0].positions(length) if cache else first)
        x = self.dropout(x)
        beyond = end > self.config.context
        mask = masks.window(self.config.context - 1, 0) if beyond else None
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, cache=cache[layer] if cache else None)
        return F.linear(self.norm(x), self.token_embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token given those before it: a float32 scalar.

        ``tokens`` is ``[batch, length + 1]``: the first ``length`` are read, the last predicted.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens must be [batch, length] with length >= 2, got {list(tokens.shape)}"
            )
        logits = self(tokens[:, :-1])
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten())

    def allocate_cache(self, batch: int, max_len: int) -> list[KVCache]:
        """An empty cache for each block."""
        layers = [cast(FlashMultiHeadAttention, block.attention) for block in self.blocks]
        return [layer.allocate_cache(batch, max_len) for layer in layers]

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        prompt_lengths: Tensor | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue each prompt by ``max_new_tokens`` sampled tokens.

        Args:
            tokens: prompts ``[batch, length]``, length at least 1.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among that many likeliest tokens only.
            seed, generator: of the random choices (give at most one); PyTorch's default generator
                otherwise. With a seed the choices are drawn on the CPU.
            prompt_lengths: ``[batch]``, true lengths of right-padded prompts (needs the cache).
            use_cache: keep keys and values between steps; False reads everything again each time.

        Returns:
            ``[batch, length + max_new_tokens]``. Row ``b`` holds its prompt, then its new tokens;
            for a prompt shorter than ``length``, zeros fill the rest.
        """
        steps = self.stream(
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            generator=generator,
            prompt_lengths=prompt_lengths,
            use_cache=use_cache,
        )
        new = torch.stack([tokens.new_empty(tokens.shape[0]), *steps], dim=1)[:, 1:]
        if prompt_lengths is None:
            return torch.cat((tokens, new), dim=1)
        lengths = prompt_lengths.to(tokens.device).long()[:, None]
        column = torch.arange(tokens.shape[1], device=tokens.device)
        padded = torch.where(column < lengths, tokens, 0)
        out = torch.cat((padded, torch.zeros_like(new)), dim=1)
        where = lengths + torch.arange(max_new_tokens, device=tokens.device)
        return out.scatter(1, where, new)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        prompt_lengths: Tensor | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """The tokens of :meth:`generate` as they come: ``max_new_tokens`` times ``[batch]``."""
        self._check_prompt(tokens, max_new_tokens, prompt_lengths, use_cache)
        if seed is not None:
            if generator is not None:
                raise ValueError("give seed or generator, not both")
            generator = torch.Generator().manual_seed(seed)
        was_training = self.training
        self.eval()
        try:
            batch, length = tokens.shape
            cache = self.allocate_cache(batch, length + max_new_tokens) if use_cache else None
            last = torch.full((batch,), length - 1, device=tokens.device)
            read = tokens
            for step in range(max_new_tokens):
                logits = self(read, cache=cache)
                if step == 0 and cache is not None and prompt_lengths is not None:
                    for layer in cache:
                        layer.truncate(prompt_lengths)
                    last = prompt_lengths.to(tokens.device).long() - 1
                rows = torch.arange(batch, device=tokens.device)
                chosen = sample(logits[rows, last], temperature, top_k, generator)
                yield chosen
                if cache is None:
                    read = torch.cat((read, chosen[:, None]), dim=1)
                    last = last + 1
                else:
                    read = chosen[:, None]
                    last = torch.zeros_like(last)
        finally:
            self.train(was_training)

    def _check_prompt(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        prompt_lengths: Tensor | None,
        use_cache: bool,
    ) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens must be [batch, length] with length >= 1, got {list(tokens.shape)}"
            )
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        total = tokens.shape[1] + max_new_tokens
        if self.position_embedding is not None and total > self.config.context:
            raise ValueError(
                f"{tokens.shape[1]} + {max_new_tokens} tokens exceed context "
                f"{self.config.context}, which learned positions cannot extend"
            )
        if prompt_lengths is None:
            return
        if not use_cache:
            raise ValueError("prompt_lengths needs use_cache=True")
        fits = prompt_lengths.shape == tokens.shape[:1] and not prompt_lengths.is_floating_point()
        if not fits or bool(((prompt_lengths < 1) | (prompt_lengths > tokens.shape[1])).any()):
            raise ValueError(
                f"prompt_lengths must be [{tokens.shape[0]}] integers between 1 and "
                f"{tokens.shape[1]}, got {prompt_lengths.tolist()}"
            )
