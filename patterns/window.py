"""window: the most recent keys, the query's own included (Longformer, StreamingLLM, Mistral, MoA)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.expr import Pred
from sparsify.patterns.pattern import K, Pattern, Q
from sparsify.sizes import Size


@dataclass(frozen=True)
class Window(Pattern):
    """-ahead <= q - k < size."""

    size: Size
    ahead: Size = Size("0")

    def keep(self) -> Pred:
        return (self.size.expr() > Q - K) & (self.ahead.expr() >= K - Q)


def window(size: int | str, ahead: int | str = 0) -> Pattern:
    """The last `size` keys counting the query itself (0 <= q - k < size), and `ahead` more after it.

    Hugging Face's `sliding_window` counts in the same way; FlashAttention's `window_size` counts keys left of self,
    so its (w, 0) is `window(w + 1)`.
    """
    return Window(Size.read(size, "window.size", low=1), Size.read(ahead, "window.ahead", low=0))
